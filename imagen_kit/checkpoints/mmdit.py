"""MMDiT: Stability AI's files of Stable Diffusion 3 and 3.5, and diffusers' SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Concat, Rename, Rule, SwapHalves
from imagen_kit.errors import KitError

_HEAD = 64  # width of a head in every published model
_SIZE = 128  # latents of pictures of 1024²
_FLOW = 1000.0  # the published networks are told 1000·t of the flow schedule


def _sizes(shapes: Shapes, embed: str, table: str, text: str, mlp: str) -> dict[str, Any]:
    """What both layouts read off the same tensors, under their own names."""
    width, channels, patch, _ = shapes[embed]
    grid = round(shapes[table][1] ** 0.5)
    if grid**2 != shapes[table][1]:
        raise KitError(f"{table} has {shapes[table][1]} positions, which make no square")
    return {
        "in_channels": channels,
        "patch_size": patch,
        "width": width,
        "context_dim": shapes["context_embedder.weight"][1],
        "pooled_dim": shapes[text][1],
        "time_scale": _FLOW,
        "details": {"mlp_ratio": shapes[mlp][0] / width, "grid": grid},
        "_size": min(_SIZE, grid * patch),
    }


def _dual(shapes: Shapes, template: str, depth: int) -> list[int]:
    return [i for i in range(depth) if template.format(i=i) in shapes]


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    kwargs = _sizes(
        shapes,
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.mlp.0.weight",
        "joint_blocks.0.x_block.mlp.fc1.bias",
    )
    width, depth = kwargs["width"], shapes.count("joint_blocks.{i}.{rest}")
    kwargs["details"] |= {
        "qk_norm": norm in shapes,
        "dual_layers": _dual(shapes, "joint_blocks.{i}.x_block.attn2.qkv.weight", depth),
    }
    return {
        **kwargs,
        "out_channels": shapes["final_layer.linear.weight"][0] // kwargs["patch_size"] ** 2,
        "depth": depth,
        "heads": width // (shapes[norm][0] if norm in shapes else _HEAD),
    }


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise KitError(f"qk_norm {config['qk_norm']!r}: SD3's transformers have 'rms_norm' or none")
    norm = "transformer_blocks.0.attn.norm_q.weight"
    kwargs = _sizes(
        shapes,
        "pos_embed.proj.weight",
        "pos_embed.pos_embed",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.ff.net.0.proj.bias",
    )
    width = kwargs["width"]
    depth = int(config.get("num_layers", shapes.count("transformer_blocks.{i}.{rest}")))
    head = shapes[norm][0] if norm in shapes else _HEAD
    kwargs["details"] |= {
        "qk_norm": norm in shapes,
        "dual_layers": _dual(shapes, "transformer_blocks.{i}.attn2.to_q.weight", depth),
    }
    return {
        **kwargs,
        "out_channels": shapes["proj_out.weight"][0] // kwargs["patch_size"] ** 2,
        "depth": depth,
        "heads": int(config.get("num_attention_heads", width // head)),
        "_size": int(config.get("sample_size", kwargs["_size"])),
    }


def _details(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a recipe's mmdit may lack and the published ones have."""
    if kwargs.get("pooled_dim") is None:
        raise KitError("this mmdit is told no pooled text, which SD3's community formats all are")
    return kwargs.get("details") or {}


def _rules_official(kwargs: Mapping[str, Any]) -> list[Rule]:
    _details(kwargs)
    if kwargs["width"] // kwargs["heads"] != _HEAD:
        head = kwargs["width"] // kwargs["heads"]
        raise KitError(f"this mmdit has heads of width {head}; an official file's all have {_HEAD}")
    return []


def _rules_diffusers(kwargs: Mapping[str, Any]) -> list[Rule]:
    ratio = _details(kwargs).get("mlp_ratio", 4.0)
    if ratio != 4.0:
        raise KitError(f"this mmdit has mlp_ratio {ratio}, which diffusers' SD3 cannot say: it has 4")
    theirs, ours = "transformer_blocks.{i}.", "joint_blocks.{i}."
    last = kwargs["depth"] - 1
    rules: list[Rule] = []
    for end in ("weight", "bias"):
        for names, stream in (
            (("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn"),
            (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn"),
            (("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2"),
        ):
            rules.append(Concat([f"{theirs}{name}.{end}" for name in names], f"{ours}{stream}.qkv.{end}"))
        # diffusers keeps (scale, shift) where nothing is gated
        modulation = f"adaLN_modulation.1.{end}"
        rules.append(SwapHalves(f"norm_out.linear.{end}", f"final_layer.{modulation}"))
        rules.append(
            SwapHalves(
                f"transformer_blocks.{last}.norm1_context.linear.{end}",
                f"joint_blocks.{last}.context_block.{modulation}",
            )
        )
    for there, here in (
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        ("attn.to_out.0", "x_block.attn.proj"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("attn.norm_q", "x_block.attn.ln_q"),
        ("attn.norm_k", "x_block.attn.ln_k"),
        ("attn.norm_added_q", "context_block.attn.ln_q"),
        ("attn.norm_added_k", "context_block.attn.ln_k"),
        ("attn2.to_out.0", "x_block.attn2.proj"),
        ("attn2.norm_q", "x_block.attn2.ln_q"),
        ("attn2.norm_k", "x_block.attn2.ln_k"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
    ):
        rules.append(Rename(f"{theirs}{there}.{{end}}", f"{ours}{here}.{{end}}"))
    embed = "time_text_embed."
    return [
        *rules,
        Rename("pos_embed.pos_embed", "pos_embed"),
        Rename("pos_embed.proj.{end}", "x_embedder.proj.{end}"),
        Rename(f"{embed}timestep_embedder.linear_1.{{end}}", "t_embedder.mlp.0.{end}"),
        Rename(f"{embed}timestep_embedder.linear_2.{{end}}", "t_embedder.mlp.2.{end}"),
        Rename(f"{embed}text_embedder.linear_1.{{end}}", "y_embedder.mlp.0.{end}"),
        Rename(f"{embed}text_embedder.linear_2.{{end}}", "y_embedder.mlp.2.{end}"),
        Rename("proj_out.{end}", "final_layer.linear.{end}"),
    ]


def _config_diffusers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    details = kwargs["details"]
    return {
        "sample_size": kwargs.get("_size", _SIZE),
        "patch_size": kwargs["patch_size"],
        "in_channels": kwargs["in_channels"],
        "num_layers": kwargs["depth"],
        "attention_head_dim": kwargs["width"] // kwargs["heads"],
        "num_attention_heads": kwargs["heads"],
        "joint_attention_dim": kwargs["context_dim"],
        "caption_projection_dim": kwargs["width"],
        "pooled_projection_dim": kwargs["pooled_dim"],
        "out_channels": kwargs["out_channels"] or kwargs["in_channels"],
        "pos_embed_max_size": details["grid"],
        "dual_attention_layers": list(details["dual_layers"]),
        "qk_norm": "rms_norm" if details["qk_norm"] else None,
    }


register(
    Format(
        "mmdit_official",
        "denoiser",
        "mmdit",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "x_embedder.proj.weight",
            "pos_embed",
            "context_embedder.weight",
            "joint_blocks.{i}.x_block.attn.qkv.weight",
            "joint_blocks.{i}.context_block.attn.qkv.weight",
            "final_layer.linear.weight",
        ),
        prefixes=("", "model.diffusion_model."),
    )
)
register(
    Format(
        "mmdit_diffusers",
        "denoiser",
        "mmdit",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "pos_embed.proj.weight",
            "pos_embed.pos_embed",
            "time_text_embed.text_embedder.linear_1.weight",
            "transformer_blocks.{i}.attn.add_q_proj.weight",
            "proj_out.weight",
        ),
        lacks=("single_transformer_blocks.{i}.{rest}",),
        classes=("SD3Transformer2DModel",),
    )
)

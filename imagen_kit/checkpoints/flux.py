"""FLUX.1: Black Forest Labs' files, and diffusers' FluxTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Concat, Rename, Rule, SwapHalves
from imagen_kit.denoisers.layers.rope import default_widths
from imagen_kit.errors import KitError

_PATCH = 2  # files hold packed channels alone; every published model packs squares of 2×2
_SIZE = 128  # latents of pictures of 1024²
_FLOW = 1000.0  # the networks multiply times of the flow schedule by this themselves


def _packed(channels: int, what: str) -> int:
    if channels % _PATCH**2:
        raise KitError(f"{what} has {channels} packed channels, which are no squares of {_PATCH}×{_PATCH}")
    return channels // _PATCH**2


def _arguments(
    shapes: Shapes, named: Mapping[str, str], counts: tuple[int, int], axes: Any, theta: float
) -> dict[str, Any]:
    """What both layouts read off the same tensors, whose names there are given."""
    width, packed = shapes[named["picture"]]
    head = shapes[named["norm"]][0]
    return {
        "in_channels": _packed(packed, named["picture"]),
        "out_channels": _packed(shapes[named["answer"]][0], named["answer"]),
        "width": width,
        "depth": counts[0],
        "single_depth": counts[1],
        "heads": width // head,
        "context_dim": shapes[named["text"]][1],
        "pooled_dim": shapes[named["pooled"]][1],
        "guidance": named["guidance"] in shapes,
        "time_scale": _FLOW,
        "details": {
            "mlp_ratio": shapes[named["mlp"]][0] / width,
            "qkv_bias": named["bias"] in shapes,
            "axes": list(axes or default_widths(head)),
            "theta": float(theta),
        },
        "_size": _SIZE,
    }


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    named = {
        "picture": "img_in.weight",
        "answer": "final_layer.linear.weight",
        "text": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
        "guidance": "guidance_in.in_layer.weight",
        "norm": "double_blocks.0.img_attn.norm.query_norm.scale",
        "mlp": "double_blocks.0.img_mlp.0.bias",
        "bias": "double_blocks.0.img_attn.qkv.bias",
    }
    counts = shapes.count("double_blocks.{i}.{rest}"), shapes.count("single_blocks.{i}.{rest}")
    return _arguments(shapes, named, counts, config.get("axes_dim"), config.get("theta", 10_000))


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    if config.get("patch_size", 1) != 1:
        raise KitError(f"patch_size {config['patch_size']}: only 1 is FLUX, whose pictures come packed")
    named = {
        "picture": "x_embedder.weight",
        "answer": "proj_out.weight",
        "text": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
        "norm": "transformer_blocks.0.attn.norm_q.weight",
        "mlp": "transformer_blocks.0.ff.net.0.proj.bias",
        "bias": "transformer_blocks.0.attn.to_q.bias",
    }
    counts = (
        int(config.get("num_layers", shapes.count("transformer_blocks.{i}.{rest}"))),
        int(config.get("num_single_layers", shapes.count("single_transformer_blocks.{i}.{rest}"))),
    )
    return _arguments(shapes, named, counts, config.get("axes_dims_rope"), 10_000)


def _details(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a recipe's flux may have otherwise than the community's."""
    details = kwargs.get("details") or {}
    if details.get("patch_size", _PATCH) != _PATCH:
        raise KitError(f"this flux has patches of {details['patch_size']}; FLUX's community formats have 2")
    if kwargs.get("pooled_dim") is None:
        raise KitError("this flux is told no pooled text, which FLUX's community formats all are")
    return details


def _rules_official(kwargs: Mapping[str, Any]) -> list[Rule]:
    _details(kwargs)
    return [
        Rename("{rest}_norm.scale", "{rest}_norm.weight"),
        Rename("{part}_in.in_layer.{end}", "{part}_in.mlp.0.{end}"),
        Rename("{part}_in.out_layer.{end}", "{part}_in.mlp.2.{end}"),
        Rename("double_blocks.{i}.{part}_mlp.0.{end}", "double_blocks.{i}.{part}_mlp.fc1.{end}"),
        Rename("double_blocks.{i}.{part}_mlp.2.{end}", "double_blocks.{i}.{part}_mlp.fc2.{end}"),
    ]


def _rules_diffusers(kwargs: Mapping[str, Any]) -> list[Rule]:
    details = _details(kwargs)
    for key, value in (("mlp_ratio", 4.0), ("qkv_bias", True), ("theta", 10_000.0)):
        if details.get(key, value) != value:
            raise KitError(
                f"this flux has {key} {details[key]}, which diffusers' FLUX cannot say: it has {value}"
            )
    return [*_double(), *_single(kwargs["width"], int(kwargs["width"] * 4)), *_ends()]


def _double() -> list[Rule]:
    theirs, ours = "transformer_blocks.{i}.", "double_blocks.{i}."
    rules: list[Rule] = []
    for end in ("weight", "bias"):
        for stream, form in (("img", "to_{}"), ("txt", "add_{}_proj")):
            parts = [f"{theirs}attn.{form.format(letter)}.{end}" for letter in "qkv"]
            rules.append(Concat(parts, f"{ours}{stream}_attn.qkv.{end}"))
    for there, here in (
        ("norm1.linear", "img_mod.lin"),
        ("norm1_context.linear", "txt_mod.lin"),
        ("attn.to_out.0", "img_attn.proj"),
        ("attn.to_add_out", "txt_attn.proj"),
        ("attn.norm_q", "img_attn.norm.query_norm"),
        ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm"),
        ("ff.net.0.proj", "img_mlp.fc1"),
        ("ff.net.2", "img_mlp.fc2"),
        ("ff_context.net.0.proj", "txt_mlp.fc1"),
        ("ff_context.net.2", "txt_mlp.fc2"),
    ):
        rules.append(Rename(f"{theirs}{there}.{{end}}", f"{ours}{here}.{{end}}"))
    return rules


def _single(width: int, hidden: int) -> list[Rule]:
    theirs, ours = "single_transformer_blocks.{i}.", "single_blocks.{i}."
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    rules: list[Rule] = [
        Concat(
            [f"{theirs}{part}.{end}" for part in parts],
            f"{ours}linear1.{end}",
            sizes=[width, width, width, hidden],
        )
        for end in ("weight", "bias")
    ]
    for there, here in (
        ("norm.linear", "modulation.lin"),
        ("proj_out", "linear2"),
        ("attn.norm_q", "norm.query_norm"),
        ("attn.norm_k", "norm.key_norm"),
    ):
        rules.append(Rename(f"{theirs}{there}.{{end}}", f"{ours}{here}.{{end}}"))
    return rules


def _ends() -> list[Rule]:
    rules: list[Rule] = []
    for there, here in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in")):
        for number, place in ((1, 0), (2, 2)):
            name = f"time_text_embed.{there}_embedder.linear_{number}"
            rules.append(Rename(f"{name}.{{end}}", f"{here}.mlp.{place}.{{end}}"))
    return [
        *rules,
        Rename("x_embedder.{end}", "img_in.{end}"),
        Rename("context_embedder.{end}", "txt_in.{end}"),
        # diffusers keeps (scale, shift) where nothing is gated
        SwapHalves("norm_out.linear.{end}", "final_layer.adaLN_modulation.1.{end}"),
        Rename("proj_out.{end}", "final_layer.linear.{end}"),
    ]


def _config_diffusers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    channels = kwargs["in_channels"] * _PATCH**2
    out = (kwargs["out_channels"] or kwargs["in_channels"]) * _PATCH**2
    head = kwargs["width"] // kwargs["heads"]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": kwargs["depth"],
        "num_single_layers": kwargs["single_depth"],
        "attention_head_dim": head,
        "num_attention_heads": kwargs["heads"],
        "joint_attention_dim": kwargs["context_dim"],
        "pooled_projection_dim": kwargs["pooled_dim"],
        "guidance_embeds": kwargs["guidance"],
        "axes_dims_rope": list(kwargs["details"].get("axes") or default_widths(head)),
    }


register(
    Format(
        "flux_official",
        "denoiser",
        "flux",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "img_in.weight",
            "txt_in.weight",
            "vector_in.in_layer.weight",
            "double_blocks.{i}.img_attn.qkv.weight",
            "final_layer.linear.weight",
        ),
        prefixes=("", "model.diffusion_model."),
    )
)
register(
    Format(
        "flux_diffusers",
        "denoiser",
        "flux",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "x_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "transformer_blocks.{i}.attn.add_q_proj.weight",
            "transformer_blocks.{i}.attn.norm_added_q.weight",
            "proj_out.weight",
        ),
        lacks=("pos_embed.proj.weight",),
        classes=("FluxTransformer2DModel",),
    )
)

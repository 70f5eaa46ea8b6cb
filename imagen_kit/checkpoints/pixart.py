"""PixArt-α and Σ: the official files, and diffusers' PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Concat, Ignore, Rename, Rule
from imagen_kit.errors import KitError

_HEADS = {1152: 16}  # of the published widths
_SIGMA_TOKENS = 300  # of the null caption, by which Σ's files differ from α's 120
_NULL = "y_embedder.y_embedding"


def _heads(width: int) -> int:
    if width not in _HEADS:
        raise KitError(
            f"width {width} is of no published PixArt, so its number of heads is unknown; give its config"
        )
    return _HEADS[width]


def _interpolation(grid: int, sigma: bool) -> float:
    """Of the published models: 1 up to 512² and 2 at 1024², for Σ also 0.5 at 256²."""
    scale = grid / 32
    return scale if sigma else max(1.0, scale)


def _learned(shapes: Shapes, answer: str, channels: int, patch: int) -> bool:
    out = shapes[answer][0] // patch**2
    if out not in (channels, 2 * channels):
        raise KitError(
            f"{answer} answers {out} channels: a PixArt has {channels} or, with a variance, {2 * channels}"
        )
    return out == 2 * channels


def _table(grid: int, interpolation: float, width: int) -> Tensor:
    """The official position table (1, grid², width): float32 places, float64 angles, and so its very bits."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / (width / 4.0))
    places = torch.arange(grid, dtype=torch.float32) / interpolation
    angles = places.double()[:, None] * omega
    row = torch.cat([angles.sin(), angles.cos()], 1)
    x, y = row[None].expand(grid, grid, -1), row[:, None].expand(grid, grid, -1)
    return torch.cat([x, y], -1).reshape(1, grid * grid, width).float()


def _compression(shapes: Shapes) -> dict[str, Any]:
    """Of the keys and values of PixArt-Σ's blocks."""
    depth = shapes.count("blocks.{i}.{rest}")
    found = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in shapes]
    ratio = shapes[f"blocks.{found[0]}.attn.sr.weight"][-1] if found else 1
    return {"compress": ratio, "compressed": found}


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens = shapes[_NULL][0]
    sizes = "csize_embedder.mlp.0.weight" in shapes
    # files without the table, which their loaders compute, are of the resolution that sizes and text tell
    table = shapes.get("pos_embed")
    usual = 64 if sizes or tokens == _SIGMA_TOKENS else 32
    side = int(config.get("input_size", patch * (round(table[1] ** 0.5) if table else usual)))
    grid = side // patch
    return {
        "in_channels": channels,
        "learn_sigma": _learned(shapes, "final_layer.linear.weight", channels, patch),
        "patch_size": patch,
        "width": width,
        "depth": shapes.count("blocks.{i}.{rest}"),
        "heads": int(config["num_heads"]) if "num_heads" in config else _heads(width),
        "context_dim": shapes[_NULL][1],
        "sizes": sizes,
        "null_tokens": tokens,
        "details": {
            "mlp_ratio": shapes["blocks.0.mlp.fc1.bias"][0] / width,
            "grid": grid,
            **_compression(shapes),
            "interpolation": float(
                config.get(
                    "lewei_scale",
                    config.get("pe_interpolation", _interpolation(grid, tokens == _SIGMA_TOKENS)),
                )
            ),
        },
        "_size": side,
        "_table": table is not None,
    }


def _rules_official(kwargs: Mapping[str, Any]) -> list[Rule]:
    if not kwargs.get("null_tokens"):
        raise KitError("this pixart has no null caption (null_tokens), which an official PixArt file holds")
    details = kwargs["details"]
    grid, interpolation, width = details["grid"], details["interpolation"], kwargs["width"]
    rules: list[Rule] = [
        Rename("blocks.{i}.cross_attn.q_linear.{end}", "blocks.{i}.cross_attn.q.{end}"),
        Rename("blocks.{i}.cross_attn.kv_linear.{end}", "blocks.{i}.cross_attn.kv.{end}"),
    ]
    if kwargs.get("_table", True):
        rules.append(Ignore("pos_embed", make=lambda: _table(grid, interpolation, width)))
    return rules


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    for key, value in (
        ("norm_type", "ada_norm_single"),
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
    ):
        if config.get(key, value) != value:
            raise KitError(f"{key} {config[key]!r}: only {value!r} is PixArt")
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    sizes = "adaln_single.emb.resolution_embedder.linear_1.weight" in shapes
    side = int(config.get("sample_size", 128 if sizes else 64))
    scale = config.get("interpolation_scale")
    return {
        "in_channels": channels,
        "learn_sigma": _learned(shapes, "proj_out.weight", channels, patch),
        "patch_size": patch,
        "width": width,
        "depth": int(config.get("num_layers", shapes.count("transformer_blocks.{i}.{rest}"))),
        "heads": int(config["num_attention_heads"]) if "num_attention_heads" in config else _heads(width),
        "context_dim": shapes["caption_projection.linear_1.weight"][1],
        "sizes": sizes,
        "null_tokens": 0,
        "details": {
            "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.bias"][0] / width,
            "grid": side // patch,
            "interpolation": float(max(side // 64, 1) if scale is None else scale),
        },
        "_size": side,
    }


def _rules_diffusers(kwargs: Mapping[str, Any]) -> list[Rule]:
    ratio = kwargs["details"].get("mlp_ratio", 4.0)
    if ratio != 4.0:
        raise KitError(f"this pixart has mlp_ratio {ratio}, which diffusers' PixArt cannot say: it has 4")
    if kwargs["details"].get("compressed"):
        raise KitError("this pixart compresses keys and values, which diffusers' PixArt cannot say")
    theirs, ours = "transformer_blocks.{i}.", "blocks.{i}."
    rules: list[Rule] = []
    for end in ("weight", "bias"):
        parts = [f"{theirs}attn1.to_{letter}.{end}" for letter in "qkv"]
        rules.append(Concat(parts, f"{ours}attn.qkv.{end}"))
        rules.append(Concat([f"{theirs}attn2.to_{x}.{end}" for x in "kv"], f"{ours}cross_attn.kv.{end}"))
    for there, here in (
        ("attn1.to_out.0", "attn.proj"),
        ("attn2.to_q", "cross_attn.q"),
        ("attn2.to_out.0", "cross_attn.proj"),
        ("ff.net.0.proj", "mlp.fc1"),
        ("ff.net.2", "mlp.fc2"),
    ):
        rules.append(Rename(f"{theirs}{there}.{{end}}", f"{ours}{here}.{{end}}"))
    for there, here in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar")):
        for number, place in ((1, 0), (2, 2)):
            name = f"adaln_single.emb.{there}_embedder.linear_{number}.{{end}}"
            rules.append(Rename(name, f"{here}_embedder.mlp.{place}.{{end}}"))
    return [
        *rules,
        Rename(f"{theirs}scale_shift_table", f"{ours}scale_shift_table"),
        Rename("scale_shift_table", "final_layer.scale_shift_table"),
        Rename("pos_embed.proj.{end}", "x_embedder.proj.{end}"),
        Rename("adaln_single.linear.{end}", "t_block.1.{end}"),
        Rename("caption_projection.linear_1.{end}", "y_embedder.y_proj.fc1.{end}"),
        Rename("caption_projection.linear_2.{end}", "y_embedder.y_proj.fc2.{end}"),
        Rename("proj_out.{end}", "final_layer.linear.{end}"),
        # diffusers' folders keep no null caption: their "no text" is the empty prompt
        Rule((), _NULL, lambda *_: (), lambda *_: ()),
    ]


def _config_diffusers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    details = kwargs["details"]
    return {
        "num_attention_heads": kwargs["heads"],
        "attention_head_dim": kwargs["width"] // kwargs["heads"],
        "in_channels": kwargs["in_channels"],
        "out_channels": kwargs["in_channels"] * (2 if kwargs["learn_sigma"] else 1),
        "num_layers": kwargs["depth"],
        "cross_attention_dim": kwargs["width"],
        "attention_bias": True,
        "sample_size": details["grid"] * kwargs["patch_size"],
        "patch_size": kwargs["patch_size"],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": details["interpolation"],
        "use_additional_conditions": kwargs["sizes"],
        "caption_channels": kwargs["context_dim"],
    }


register(
    Format(
        "pixart_official",
        "denoiser",
        "pixart",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "x_embedder.proj.weight",
            _NULL,
            "t_block.1.weight",
            "blocks.{i}.scale_shift_table",
            "blocks.{i}.cross_attn.kv_linear.weight",
        ),
    )
)
register(
    Format(
        "pixart_diffusers",
        "denoiser",
        "pixart",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "pos_embed.proj.weight",
            "adaln_single.linear.weight",
            "caption_projection.linear_1.weight",
            "transformer_blocks.{i}.scale_shift_table",
            "proj_out.weight",
        ),
        classes=("PixArtTransformer2DModel", "Transformer2DModel"),
    )
)

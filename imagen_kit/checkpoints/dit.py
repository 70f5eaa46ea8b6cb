"""DiT (and SiT, whose network it is): the official .pt files and diffusers' DiTTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Concat, Ignore, Rename, Rule
from imagen_kit.errors import KitError

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths
_SIZE = 32  # latents of pictures of 256²
_OFFICIAL = {"frequency_shift": 0.0, "mlp_norm_eps": 1e-6, "block_embedders": False}


def _heads(width: int) -> int:
    if width not in _HEADS:
        raise KitError(
            f"width {width} is of no published DiT, so its number of heads is unknown; give its config"
        )
    return _HEADS[width]


def _table(grid: int, width: int) -> Tensor:
    """The official position table (1, grid², width), in its float64 arithmetic and so with its very bits."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / (width / 4.0))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    row = torch.cat([angles.sin(), angles.cos()], 1)
    x = row[None].expand(grid, grid, -1)
    y = row[:, None].expand(grid, grid, -1)
    return torch.cat([x, y], -1).reshape(1, grid * grid, width).float()


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    rows = shapes["y_embedder.embedding_table.weight"][0]
    out = shapes["final_layer.linear.weight"][0] // patch**2
    null = float(config.get("class_dropout_prob", 0.1)) > 0
    return {
        "in_channels": channels,
        "learn_sigma": bool(config.get("learn_sigma", out == 2 * channels)),
        "patch_size": patch,
        "width": width,
        "depth": int(config.get("depth", shapes.count("blocks.{i}.{rest}"))),
        "heads": int(config["num_heads"]) if "num_heads" in config else _heads(width),
        "num_classes": int(config.get("num_classes", rows - null)),
        "details": {
            **_OFFICIAL,
            "mlp_ratio": float(config.get("mlp_ratio", shapes["blocks.0.mlp.fc1.bias"][0] / width)),
            "null_class": null,
        },
        "_size": round(shapes["pos_embed"][1] ** 0.5) * patch,
    }


def _rules_official(kwargs: Mapping[str, Any]) -> list[Rule]:
    details = kwargs.get("details") or {}
    if any(details.get(key, value) != value for key, value in _OFFICIAL.items()):
        raise KitError("this dit embeds time as diffusers does, which an official DiT file cannot say")
    _plain(kwargs)
    grid, width = kwargs.get("_size", _SIZE) // kwargs["patch_size"], kwargs["width"]
    return [Ignore("pos_embed", make=lambda: _table(grid, width))]


def _plain(kwargs: Mapping[str, Any]) -> None:
    for option in ("context_dim", "low_res_channels"):
        if kwargs.get(option):
            raise KitError(
                f"this dit has {option} {kwargs[option]}, which DiT's community formats do not know"
            )
    if kwargs.get("num_classes") is None:
        raise KitError("this dit has no class labels, which DiT's community formats all have")


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    for key, value in (
        ("norm_type", "ada_norm_zero"),
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
    ):
        if config.get(key, value) != value:
            raise KitError(f"{key} {config[key]!r}: only {value!r} is DiT")
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    out = int(config.get("out_channels") or shapes["proj_out_2.weight"][0] // patch**2)
    if out not in (channels, 2 * channels):
        raise KitError(
            f"out_channels {out}: a DiT has {channels} or, with a learned variance, {2 * channels}"
        )
    rows = shapes["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"][0]
    return {
        "in_channels": channels,
        "learn_sigma": out == 2 * channels,
        "patch_size": patch,
        "width": width,
        "depth": int(config.get("num_layers", shapes.count("transformer_blocks.{i}.{rest}"))),
        "heads": int(config["num_attention_heads"]) if "num_attention_heads" in config else _heads(width),
        "num_classes": int(config.get("num_embeds_ada_norm", rows - 1)),
        "details": {
            "frequency_shift": 1.0,
            "mlp_norm_eps": float(config.get("norm_eps", 1e-5)),
            "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.bias"][0] / width,
            "null_class": True,
            "block_embedders": True,
        },
        "_size": int(config.get("sample_size", _SIZE)),
    }


def _rules_diffusers(kwargs: Mapping[str, Any]) -> list[Rule]:
    details = kwargs.get("details") or {}
    if not (details.get("block_embedders") and details.get("frequency_shift") == 1.0):
        raise KitError("this dit embeds time as the official code does, which diffusers' DiT cannot")
    _plain(kwargs)
    block = "transformer_blocks.{i}."
    rules: list[Rule] = []
    for end in ("weight", "bias"):
        parts = [f"{block}attn1.to_{letter}.{end}" for letter in "qkv"]
        rules.append(Concat(parts, "blocks.{i}.attn.qkv." + end))
    for theirs, ours in (
        ("norm1.emb.timestep_embedder.linear_1", "embedders.{i}.t_embedder.mlp.0"),
        ("norm1.emb.timestep_embedder.linear_2", "embedders.{i}.t_embedder.mlp.2"),
        ("norm1.emb.class_embedder.embedding_table", "embedders.{i}.y_embedder.embedding_table"),
        ("norm1.linear", "blocks.{i}.adaLN_modulation.1"),
        ("attn1.to_out.0", "blocks.{i}.attn.proj"),
        ("ff.net.0.proj", "blocks.{i}.mlp.fc1"),
        ("ff.net.2", "blocks.{i}.mlp.fc2"),
    ):
        rules.append(Rename(f"{block}{theirs}.{{end}}", f"{ours}.{{end}}"))
    return [
        *rules,
        Rename("pos_embed.proj.{end}", "x_embedder.proj.{end}"),
        Rename("proj_out_1.{end}", "final_layer.adaLN_modulation.1.{end}"),
        Rename("proj_out_2.{end}", "final_layer.linear.{end}"),
    ]


def _config_diffusers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": kwargs["heads"],
        "attention_head_dim": kwargs["width"] // kwargs["heads"],
        "in_channels": kwargs["in_channels"],
        "out_channels": kwargs["in_channels"] * (2 if kwargs["learn_sigma"] else 1),
        "num_layers": kwargs["depth"],
        "sample_size": kwargs.get("_size", _SIZE),
        "patch_size": kwargs["patch_size"],
        "num_embeds_ada_norm": kwargs["num_classes"],
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": kwargs["details"]["mlp_norm_eps"],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
    }


register(
    Format(
        "dit_official",
        "denoiser",
        "dit",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "x_embedder.proj.weight",
            "y_embedder.embedding_table.weight",
            "blocks.{i}.adaLN_modulation.1.weight",
            "blocks.{i}.attn.qkv.weight",
            "final_layer.linear.weight",
        ),
        lacks=("blocks.{i}.cross_attn.{rest}", "joint_blocks.{i}.{rest}"),
    )
)
register(
    Format(
        "dit_diffusers",
        "denoiser",
        "dit",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "pos_embed.proj.weight",
            "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight",
            "transformer_blocks.{i}.attn1.to_q.weight",
            "proj_out_1.weight",
            "proj_out_2.weight",
        ),
        classes=("DiTTransformer2DModel", "Transformer2DModel"),
    )
)

"""Tensor names and config of diffusers' U-Nets, and of ``adm``: both tell blocks apart by level.

UNet2DConditionModel and UNet2DModel compose a network from block types by level; what they have in common with IF,
Stable Diffusion and DDPM is read here, what sets those apart in their own files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagen_kit.checkpoints.formats import Config, Shapes
from imagen_kit.checkpoints.guided_keys import transformer
from imagen_kit.checkpoints.rules import Concat, Rename, Rule
from imagen_kit.errors import KitError

# Options of UNet2DConditionModel that the published models leave alone.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,),
}
_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "embed",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "skip",
}
_OUTSIDE = {
    "conv_in": "stem",
    "conv_norm_out": "norm_out",
    "conv_out": "head",
    "time_embedding.linear_1": "time.mlp.0",
    "time_embedding.linear_2": "time.mlp.2",
    "add_embedding.linear_1": "micro.0",
    "add_embedding.linear_2": "micro.2",
    "class_embedding.linear_1": "low_res_level.mlp.0",
    "class_embedding.linear_2": "low_res_level.mlp.2",
    "class_embedding": "labels",
    "encoder_hid_proj": "text_project",
    "add_embedding.norm1": "text_pool.norm1",
    "add_embedding.norm2": "text_pool.norm2",
    "add_embedding.proj": "text_pool.proj",
    "add_embedding.pool": "text_pool.pool",
}


def require(config: Config, fixed: Mapping[str, Sequence[Any]]) -> None:
    """KitError where the config sets an option to a value that none of the published models has."""
    for key, values in fixed.items():
        if key in config and config[key] not in values:
            raise KitError(f"{key} {config[key]!r} is not supported; only {' or '.join(map(repr, values))}")


def activation(config: Config) -> str:
    """``silu`` or ``gelu``; KitError for another."""
    name = str(config.get("act_fn", "silu"))
    if name not in ("silu", "swish", "gelu"):
        raise KitError(f"act_fn {name!r} is not supported; only 'silu' or 'gelu'")
    return "gelu" if name == "gelu" else "silu"


def skip_scale(config: Config) -> float:
    """Factor on residual blocks; KitError unless the middle has the same as all others."""
    factor, middle = (float(config.get(f"{k}_scale_factor", 1.0)) for k in ("resnet_out", "mid_block"))
    if factor != middle:
        raise KitError(
            f"resnet_out_scale_factor {factor} and mid_block_scale_factor {middle} must be the same"
        )
    return 1.0 if factor == 1.0 else round(1.0 / factor, 12)


def structure(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    """Arguments of ``adm`` that shapes and the common options tell; the attentions still lack their heads."""
    config = config or {}
    down, up = config.get("down_block_types"), config.get("up_block_types")
    if down and up and mirrored(down) != list(up):
        raise KitError(
            f"up_block_types {', '.join(up)}: must mirror down_block_types, {', '.join(mirrored(down))}"
        )
    count = shapes.count("down_blocks.{i}.{rest}")
    levels: list[dict[str, Any]] = []
    for i in range(count):
        where = f"down_blocks.{i}"
        width = shapes[f"{where}.resnets.0.conv2.weight"][0]
        levels.append(
            {
                "channels": width,
                "blocks": shapes.count(f"{where}.resnets.{{i}}.{{rest}}"),
                "attention": _attention(shapes, where, width),
                "dropout": float(config.get("dropout", 0.0)),
            }
        )
    coarsest = levels[-1]["channels"]
    rows = shapes["mid_block.resnets.0.time_emb_proj.bias"][0] // coarsest
    plain = "conv" if config.get("downsample_padding", 1) else "asymmetric"
    kinds = [_resample(shapes, i, count - 1 - i, plain) for i in range(count)]
    for level, kind in zip(levels, kinds, strict=True):
        if kind != kinds[0]:
            level["resample"] = kind
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "levels": levels,
        "middle": _attention(shapes, "mid_block", coarsest),
        "style": {
            "activation": activation(config),
            "modulation": "scale_shift" if rows == 2 else "shift",
            "resample": kinds[0],
            "groups": int(config.get("norm_num_groups", 32)),
            "eps": float(config.get("norm_eps", 1e-5)),
        },
        "embedding": {
            "dim": shapes["time_embedding.linear_2.bias"][0],
            "frequencies": shapes["time_embedding.linear_1.weight"][1],
            "shift": float(config.get("freq_shift", 0)),
            "sin_first": not config.get("flip_sin_to_cos", True),
        },
    }


def _resample(shapes: Shapes, down: int, up: int, plain: str) -> str:
    """How the way leaves a level, on which it goes down in block ``down`` and up in block ``up``."""
    ways = (f"down_blocks.{down}.downsamplers.0", f"up_blocks.{up}.upsamplers.0")
    kinds = {"residual" for way in ways if shapes.has(f"{way}.norm1.{{end}}")}
    kinds |= {plain for way in ways if shapes.has(f"{way}.conv.{{end}}")}
    if len(kinds) > 1:
        raise KitError(f"level {down} shrinks and grows in different ways, which is not supported")
    return kinds.pop() if kinds else plain


def mirrored(down: Sequence[str]) -> list[str]:
    """Block types of the way up that belong to those of the way down."""
    return [d.replace("Downsample", "Upsample").replace("DownBlock", "UpBlock") for d in reversed(down)]


def _attention(shapes: Shapes, where: str, width: int) -> dict[str, Any] | bool:
    """The attention of a block of levels, read off its first, without the number of heads."""
    if not shapes.has(f"{where}.attentions.{{i}}.{{rest}}"):
        return False
    first = f"{where}.attentions.0"
    depth = shapes.count(f"{first}.transformer_blocks.{{k}}.{{rest}}", "k")
    if depth:
        cells = shapes[f"{first}.transformer_blocks.0.attn1.to_k.weight"][1] == width
        return {"kind": "transformer", "depth": depth, "cells": cells}
    alone = shapes.has(f"{first}.add_k_proj.{{end}}") and not shapes.has(f"{first}.to_k.{{end}}")
    return {"kind": "plain", "cells": not alone, "norm": shapes.has(f"{first}.group_norm.{{end}}")}


def rules(arguments: Mapping[str, Any]) -> list[Rule]:
    """The rules between diffusers' names and ours."""
    made: list[Rule] = []
    for theirs, ours in (("down_blocks", "down"), ("up_blocks", "up")):
        made += _residual(f"{theirs}.{{i}}.resnets.{{j}}", f"{ours}.{{i}}.{{j}}.res")
    for theirs, ours in (
        ("down_blocks.{i}.downsamplers.0", "shrink"),
        ("up_blocks.{i}.upsamplers.0", "grow"),
    ):
        made += _residual(theirs, f"{ours}.{{i}}")
        made.append(Rename(f"{theirs}.conv.{{end}}", f"{ours}.{{i}}.{{end}}"))
    made += _residual("mid_block.resnets.0", "middle.res") + _residual("mid_block.resnets.1", "middle.after")
    convolutions = bool(arguments.get("_conv_projections"))
    kinds = [level["attention"] for level in arguments["levels"]]
    for theirs, ours, row in (("down_blocks", "down", kinds), ("up_blocks", "up", kinds[::-1])):
        for i, kind in enumerate(row):
            there, here = f"{theirs}.{i}.attentions.{{j}}", f"{ours}.{i}.{{j}}.attention"
            made += _attended(there, here, kind, convolutions)
    made += _attended("mid_block.attentions.0", "middle.attention", arguments["middle"], convolutions)
    return made + [Rename(f"{theirs}.{{rest}}", f"{ours}.{{rest}}") for theirs, ours in _OUTSIDE.items()]


def _residual(theirs: str, ours: str) -> list[Rule]:
    return [Rename(f"{theirs}.{a}.{{end}}", f"{ours}.{b}.{{end}}") for a, b in _RESIDUAL.items()]


def _attended(theirs: str, ours: str, kind: Mapping[str, Any] | bool, convolutions: bool) -> list[Rule]:
    if isinstance(kind, bool):
        return []
    if kind["kind"] == "transformer":
        return transformer(theirs, ours, convolutions)
    made: list[Rule] = [
        Rename(f"{theirs}.{a}.{{end}}", f"{ours}.{b}.{{end}}")
        for a, b in (("group_norm", "norm"), ("norm_cross", "context_norm"), ("to_out.0", "out"))
    ]
    own = ("to_q", "to_k", "to_v") if kind["cells"] else ("to_q",)
    for parts, name in ((own, "qkv"), (("add_k_proj", "add_v_proj"), "context")):
        for end in ("weight", "bias"):
            made.append(Concat([f"{theirs}.{p}.{end}" for p in parts], f"{ours}.{name}.{end}"))
    return made


def config(arguments: Mapping[str, Any], down: Sequence[str]) -> dict[str, Any]:
    """The options common to diffusers' U-Nets; ``down`` names the block type of each level on the way down."""
    levels, style, embedding = arguments["levels"], arguments["style"], arguments.get("embedding") or {}
    asymmetric = any((level.get("resample") or style.get("resample")) == "asymmetric" for level in levels)
    counts = [level["blocks"] for level in levels]
    return {
        "in_channels": arguments["in_channels"] + arguments.get("low_res_channels", 0),
        "out_channels": arguments["out_channels"],
        "block_out_channels": [level["channels"] for level in levels],
        "layers_per_block": counts[0] if len(set(counts)) == 1 else counts,
        "down_block_types": list(down),
        "up_block_types": mirrored(down),
        "dropout": max(level["dropout"] for level in levels),
        "downsample_padding": 0 if asymmetric else 1,
        "resnet_time_scale_shift": "scale_shift" if style.get("modulation") == "scale_shift" else "default",
        "norm_num_groups": style["groups"],
        "norm_eps": style.get("eps", 1e-5),
        "freq_shift": int(embedding.get("shift", 0)),
        "flip_sin_to_cos": not embedding.get("sin_first", False),
    }

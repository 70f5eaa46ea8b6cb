"""ADM's classifiers: the .pt files of openai/guided-diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints import guided_keys
from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rename, Reshape, Rule
from imagen_kit.denoisers.adm_classifier import SIZES, published
from imagen_kit.errors import KitError

# Constructor arguments of its EncoderUNetModel that the published classifiers share.
_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "pool": "attention",
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}


def _configure(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    arguments = {
        "num_classes": shapes["out.2.c_proj.weight"][0],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
    }
    if config is None:
        own = {"head_dim": 64, "_per_head": True}
        return {**arguments, **_published(_blocks(shapes)), **own}
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise KitError(f"{key} {config[key]!r} is not supported; only {only!r}")
    width, attended = int(config["model_channels"]), config["attention_resolutions"]
    levels = [
        {
            "channels": int(factor * width),
            "blocks": int(config["num_res_blocks"]),
            "attention": 2**i in attended,
            "dropout": float(config.get("dropout", 0.0)),
        }
        for i, factor in enumerate(config.get("channel_mult", (1, 2, 4, 8)))
    ]
    return {
        **arguments,
        "image_size": int(config["image_size"]),
        "levels": levels,
        "embed_dim": width,
        "head_dim": int(config["num_head_channels"]),
        "_per_head": not config.get("use_new_attention_order", False),
    }


def _blocks(shapes: Shapes) -> list[int]:
    """Widths of the residual blocks in their row; one that halves the side looks like the others."""
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    return [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in sorted(numbers) if n]


def _published(found: list[int]) -> dict[str, Any]:
    """Arguments of the published classifier with blocks of these widths."""
    for side, size in SIZES.items():
        widths = [c for c in size["widths"] for _ in range(size["blocks"] + 1)][:-1]
        if found == widths:
            return published(side)
    raise KitError(
        "these blocks are of no published classifier of guided-diffusion; give the config of its EncoderUNetModel"
    )


def _rules(arguments: Mapping[str, Any]) -> list[Rule]:
    attention = {"kind": "plain", "head_dim": arguments["head_dim"], "cells": True, "norm": True}
    spoken = {  # as guided_keys speaks of the whole U-Net, whose way down this is
        "levels": [
            {**level, "attention": attention if level["attention"] else False}
            for level in arguments["levels"]
        ],
        "middle": attention,
        "style": {"resample": "residual"},
    }
    return [
        Rename("out.2.positional_embedding", "pool.places"),
        Reshape("out.2.qkv_proj.weight", "pool.qkv.weight", (0, 0, 1), (0, 0)),
        Rename("out.2.qkv_proj.bias", "pool.qkv.bias"),
        Reshape("out.2.c_proj.weight", "pool.out.weight", (0, 0, 1), (0, 0)),
        Rename("out.2.c_proj.bias", "pool.out.bias"),
        *guided_keys.rules(spoken, per_head=arguments.get("_per_head", True)),
    ]


register(
    Format(
        "adm_classifier_official",
        "denoiser",
        "adm_classifier",
        "official",
        _configure,
        _rules,
        has=(
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "middle_block.1.qkv.weight",
            "out.2.positional_embedding",
            "out.2.c_proj.weight",
        ),
    )
)

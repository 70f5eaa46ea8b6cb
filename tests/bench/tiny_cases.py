"""Networks of a few thousand weights for every layout that diffusers has, as options of a ``denoiser`` case."""

from __future__ import annotations

from typing import Any

TEXT = {"kind": "transformer", "heads": 4}
SD_STYLE = {"modulation": "shift", "resample": "conv", "groups": 8}
IF_STYLE = {"activation": "gelu", "resample": "residual", "groups": 8}
SIDE = {"resolution": 8, "batch": 2, "tokens": 5}


def levels(attention: Any, first: Any = False) -> list[dict[str, Any]]:
    return [
        {"channels": 32, "blocks": 1, "attention": first},
        {"channels": 32, "blocks": 2, "attention": attention},
    ]


def deepfloyd(cells: bool, **more: Any) -> dict[str, Any]:
    attention = {"head_dim": 8, "cells": cells}
    told = {"text_width": 32, "text_heads": 4}
    return {"out_channels": 6, "context_dim": 16, "embedding": told, "levels": levels(attention), **more}


#: diffusers' class and what it is there → (our denoiser, its options).
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet2DConditionModel sd15": (
        "adm",
        {
            "in_channels": 4,
            "context_dim": 16,
            "style": SD_STYLE,
            "levels": levels(False, TEXT),
            "middle": TEXT,
        },
    ),
    "UNet2DConditionModel sdxl": (
        "adm",
        {
            "in_channels": 4,
            "context_dim": 16,
            "pooled_dim": 10,
            "embedding": {"size_numbers": 6, "size_width": 8},
            "style": SD_STYLE,
            "levels": levels({**TEXT, "depth": 2}),
        },
    ),
    "UNet2DConditionModel if": ("adm", deepfloyd(True, style=IF_STYLE)),
    "UNet2DConditionModel if stage 2": (
        "adm",
        deepfloyd(False, style={**IF_STYLE, "skip_scale": 0.7071}, low_res_channels=3),
    ),
    "UNet2DModel adm": (
        "adm",
        {
            "out_channels": 6,
            "num_classes": 7,
            "style": {"resample": "residual", "groups": 8},
            "levels": [
                {"channels": 16, "blocks": 1},
                {"channels": 32, "blocks": 1, "attention": {"head_dim": 8}},
            ],
        },
    ),
    "UNet2DModel ddpm": (
        "adm",
        {
            "style": {"modulation": "shift", "resample": "asymmetric", "groups": 8, "eps": 1e-6},
            "embedding": {"shift": 1.0, "sin_first": True},
            "levels": [
                {"channels": 16, "blocks": 1},
                {"channels": 32, "blocks": 1, "attention": {"heads": 1}},
            ],
        },
    ),
    "DiTTransformer2DModel official": (
        "dit",
        {"in_channels": 4, "learn_sigma": True, "width": 32, "depth": 2, "heads": 2, "num_classes": 10},
    ),
    "DiTTransformer2DModel own embedders": (
        "dit",
        {
            "in_channels": 4,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "num_classes": 10,
            "details": {"block_embedders": True, "frequency_shift": 1.0, "mlp_norm_eps": 1e-5},
        },
    ),
    "PixArtTransformer2DModel": (
        "pixart",
        {
            "in_channels": 4,
            "learn_sigma": True,
            "width": 48,
            "depth": 2,
            "heads": 2,
            "context_dim": 16,
            "sizes": True,
        },
    ),
    "SD3Transformer2DModel": (
        "mmdit",
        {
            "in_channels": 4,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "context_dim": 16,
            "pooled_dim": 10,
            "details": {"qk_norm": True, "dual_layers": [0], "grid": 8},
        },
    ),
    "FluxTransformer2DModel": (
        "flux",
        {
            "in_channels": 4,
            "width": 32,
            "depth": 2,
            "single_depth": 1,
            "heads": 2,
            "context_dim": 16,
            "pooled_dim": 10,
            "guidance": True,
        },
    ),
}
#: Networks that no model of diffusers can be.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {"context_dim": 16, "levels": levels(True), "head_dim": 16}),
    "efficient_unet": ("efficient_unet", {"context_dim": 16, "levels": levels({"heads": 2})}),
}
KL = {"widths": [8, 16], "blocks": 1, "groups": 4}

"""EDM2's official networks: the tensors of ``Precond``, as its pickles hold them once they are a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rename, Rule, matches
from imagen_kit.errors import KitError

_HEAD = 64  # of all published sizes
_SIZE = 64  # side of ImageNet-64's pictures and of ImageNet-512's latents
_FIXED = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
_ENC = "unet.enc.{side}_block{j}"


def _sides(shapes: Shapes) -> list[int]:
    """The sides of all levels from fine to coarse, which the names tell."""
    found = (matches(f"{_ENC}.conv_res0.weight", name) for name in shapes)
    return sorted({int(values["side"].split("x")[0]) for values in found if values is not None}, reverse=True)


def _configure(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    sides = _sides(shapes)
    if not sides or any(a != 2 * b for a, b in pairwise(sides)):
        raise KitError(
            f"levels of sides {sides}: each of an EDM2 network has half the side of the one before"
        )
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise KitError(f"{key} {config[key]!r}: only the published {value!r} is edm2")
    levels = []
    for side in sides:
        here = f"unet.enc.{side}x{side}_block"
        levels.append(
            {
                "channels": shapes[f"{here}0.conv_res0.weight"][0],
                "blocks": shapes.count(f"{here}{{i}}.conv_res0.weight"),
                "attention": f"{here}0.attn_qkv.weight" in shapes,
                "dropout": float(config.get("dropout", 0.0)),
            }
        )
    first, label = f"unet.enc.{sides[0]}x{sides[0]}_conv.weight", "unet.emb_label.weight"
    logvar = shapes.get("logvar_linear.weight")
    return {
        "in_channels": shapes[first][1] - 1,
        "out_channels": shapes["unet.out_conv.weight"][0],
        "levels": levels,
        "head_dim": int(config.get("channels_per_head", _HEAD)),
        "num_classes": shapes[label][1] if label in shapes else None,
        "logvar_channels": logvar[1] if logvar else 0,
        "_size": sides[0],
    }


def _rules(kwargs: Mapping[str, Any]) -> list[Rule]:
    side = kwargs.get("_size", _SIZE)
    rules: list[Rule] = []
    for i in range(len(kwargs["levels"])):
        rules += [
            Rename(f"unet.{part}.{side}x{side}_{{rest}}", f"{part}.{i}_{{rest}}") for part in ("enc", "dec")
        ]
        side //= 2
    own = ("emb_fourier.{rest}", "emb_noise.weight", "emb_label.weight", "out_conv.weight", "out_gain")
    return [*rules, *(Rename(f"unet.{name}", name) for name in own)]


register(
    Format(
        "edm2_precond_official",
        "denoiser",
        "edm2",
        "official",
        _configure,
        _rules,
        has=("unet.emb_fourier.freqs", "unet.emb_noise.weight", "unet.out_gain", f"{_ENC}.emb_gain"),
    )
)

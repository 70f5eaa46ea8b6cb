"""Diffusers' UNet2DModel: DDPM as published by Google, and ADM-like networks trained with that library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints import diffusers_keys, guided_keys
from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rule
from imagen_kit.errors import KitError

_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
}
# What the published DDPM checkpoints of this class have in common, for a file without its config.
_DDPM: dict[str, Any] = {
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
# Names of the attention's layers in files from before diffusers 0.17, such as the published DDPM's.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# By attention and by whether the side is changed in a residual block.
_BLOCKS = {
    (False, False): "DownBlock2D",
    (False, True): "ResnetDownsampleBlock2D",
    (True, False): "AttnDownBlock2D",
    (True, True): "AttnDownBlock2D",
}


def _configure(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = _DDPM if config is None else config
    diffusers_keys.require(config, _FIXED)
    groups = int(config.get("norm_num_groups", 32))
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise KitError(
            f"attn_norm_num_groups {config['attn_norm_num_groups']}: must equal norm_num_groups {groups}"
        )
    arguments = diffusers_keys.structure(shapes, config)
    width = config.get("attention_head_dim", 8)
    for _, attention in guided_keys.attentions(arguments):
        attention.update({"heads": 1} if width is None else {"head_dim": int(width)})
    classes = guided_keys.classes(shapes, "class_embedding.weight", config.get("num_class_embeds"))
    return {**arguments, "num_classes": classes}


def _rules(arguments: Mapping[str, Any]) -> list[Rule]:
    if arguments.get("context_dim") or arguments.get("low_res_channels"):
        raise KitError("this adm reads text or a low-resolution picture, which UNet2DModel cannot")
    if arguments["style"].get("activation", "silu") != "silu":
        raise KitError("this adm's activation is not silu, which UNet2DModel cannot say everywhere")
    kinds = [attention for _, attention in guided_keys.attentions(arguments)]
    if len({(kind.get("heads"), kind.get("head_dim")) for kind in kinds}) > 1 or any(
        (kind.get("heads") or 1) > 1 for kind in kinds
    ):
        raise KitError(
            "this adm has a number of heads by level; UNet2DModel has heads of one width, or one head"
        )
    return diffusers_keys.rules(arguments)


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    kind: Mapping[str, Any] = next((attention for _, attention in guided_keys.attentions(arguments)), {})
    style, levels, middle = arguments["style"], arguments["levels"], arguments["middle"]
    residual = [(level.get("resample") or style.get("resample")) == "residual" for level in levels]
    attended = {r for r, level in zip(residual, levels, strict=True) if level["attention"]}
    if len(attended) > 1:
        raise KitError(
            "this adm's levels with attention change the side in different ways; UNet2DModel's cannot"
        )
    resample = "resnet" if attended == {True} else "conv"
    down = [_BLOCKS[bool(level["attention"]), r] for r, level in zip(residual, levels, strict=True)]
    return {
        **diffusers_keys.config(arguments, down),
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": kind.get("head_dim"),
        "add_attention": bool(middle),
        "attn_norm_num_groups": style["groups"] if middle and middle["norm"] else None,
        "num_class_embeds": arguments.get("num_classes"),
        "time_embedding_dim": arguments["embedding"]["dim"],
        "act_fn": "silu",
    }


register(
    Format(
        "unet2d_diffusers",
        "denoiser",
        "adm",
        "diffusers",
        _configure,
        _rules,
        _config,
        has=(
            "time_embedding.linear_1.weight",
            "conv_in.weight",
            "down_blocks.{i}.resnets.{j}.time_emb_proj.weight",
            "mid_block.resnets.{i}.time_emb_proj.weight",
            "conv_out.weight",
        ),
        lacks=(
            "{part}.{i}.attentions.{j}.add_k_proj.weight",
            "mid_block.attentions.{i}.transformer_blocks.{rest}",
            "mid_block.attentions.{i}.add_k_proj.weight",
            "add_embedding.{rest}",
        ),
        classes=("UNet2DModel",),
        aliases=tuple(
            (f"{{part}}.{where}{old}.{{end}}", f"{{part}}.{where}{new}.{{end}}")
            for where in ("{i}.attentions.{j}.", "attentions.{i}.")
            for old, new in _OLD.items()
        ),
    )
)

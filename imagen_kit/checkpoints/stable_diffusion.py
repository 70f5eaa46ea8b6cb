"""Stable Diffusion's U-Nets: diffusers' UNet2DConditionModel, and single files with latent-diffusion's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints import diffusers_keys, guided_keys
from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rule
from imagen_kit.errors import KitError

_SIZE_WIDTH = 256  # of one embedded size number in SDXL
_REFINER = 2560  # pooled text and sizes of SDXL's refiner, which is told five numbers instead of six
_FIRST = (
    768  # width of CLIP-L's tokens: Stable Diffusion 1.x alone, which has 8 heads instead of heads of 64,
)
# as has the 4× upscaler, which alone has labels


def _heads(arguments: Mapping[str, Any], given: Any, context: int, classes: int | None) -> None:
    """Set the number of heads: ``given`` for all, or by level; None for the published choice."""
    levels = arguments["levels"]
    numbers = list(given) if isinstance(given, (list, tuple)) else [given] * len(levels)
    if len(numbers) != len(levels):
        raise KitError(f"{len(numbers)} numbers of heads for {len(levels)} levels: give one for each")
    everywhere = [*levels, {**levels[-1], "attention": arguments["middle"]}]
    for level, number in zip(everywhere, [*numbers, numbers[-1]], strict=True):
        if level["attention"]:
            own = 8 if context == _FIRST or classes is not None else level["channels"] // 64
            level["attention"]["heads"] = own if number is None else int(number)


def _told(
    arguments: dict[str, Any], facts: int | None, classes: int | None, size_width: int
) -> dict[str, Any]:
    """Arguments for what the network is told besides text: ``facts`` is the width of pooled text with sizes."""
    numbers, pooled = 0, None
    if facts is not None:
        numbers = 5 if (facts, size_width) == (_REFINER, _SIZE_WIDTH) else 6
        pooled = facts - numbers * size_width
        if pooled < 1:
            raise KitError(f"pooled text and {numbers} sizes of {size_width} do not fit in {facts}")
    extra = arguments["in_channels"] - arguments["out_channels"]
    low_res = (
        extra if classes is not None and extra > 0 else 0
    )  # the 4× upscaler: its labels are noise levels
    arguments["embedding"] |= {"size_numbers": numbers, "size_width": size_width, "low_res_noised": False}
    return {
        **arguments,
        "in_channels": arguments["in_channels"] - low_res,
        "low_res_channels": low_res,
        "num_classes": classes,
        "pooled_dim": pooled,
    }


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    arguments = guided_keys.structure(shapes)
    context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    given = config.get("num_heads")
    if config.get("num_head_channels", -1) != -1:
        given = [level["channels"] // int(config["num_head_channels"]) for level in arguments["levels"]]
    classes = guided_keys.classes(shapes, "label_emb.weight", None)
    _heads(arguments, None if given == -1 else given, context, classes)
    facts = shapes.get("label_emb.0.0.weight", (0, None))[1]
    return {
        **_told(arguments, facts, classes, _SIZE_WIDTH),
        "context_dim": context,
        "_conv_projections": len(shapes["middle_block.1.proj_in.weight"]) == 4,
    }


def _rules_official(arguments: Mapping[str, Any]) -> list[Rule]:
    _plain(arguments)
    guided_keys.require_plain(arguments)
    return guided_keys.rules(arguments, per_head=False)


def _plain(arguments: Mapping[str, Any]) -> None:
    middle = arguments.get("middle")
    if not middle or middle["kind"] != "transformer":
        raise KitError("this adm has no spatial transformer, so it has no Stable Diffusion format")


_FIXED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": ("text_time", None),
    "class_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),  # the levels of this model have no such factor
    "resnet_skip_time_act": (False,),
    "time_embedding_act_fn": (None,),
    **diffusers_keys.FIXED,
}


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    arguments = diffusers_keys.structure(shapes, config)
    config = config or {}
    diffusers_keys.require(config, _FIXED)
    context = shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
    default = 8 if config else None  # the library's, where a config does not say
    classes = guided_keys.classes(shapes, "class_embedding.weight", config.get("num_class_embeds"))
    _heads(arguments, config.get("attention_head_dim", default), context, classes)
    _cells(arguments, config.get("only_cross_attention", False))
    facts = shapes.get("add_embedding.linear_1.weight", (0, None))[1]
    size_width = int(config.get("addition_time_embed_dim") or _SIZE_WIDTH)
    return {
        **_told(arguments, facts, classes, size_width),
        "context_dim": context,
        "_conv_projections": len(shapes["mid_block.attentions.0.proj_in.weight"]) == 4,
    }


def _cells(arguments: Mapping[str, Any], alone: Any) -> None:
    """Shapes cannot tell cells from text of the same width: there the config decides."""
    levels = arguments["levels"]
    flags = list(alone) if isinstance(alone, (list, tuple)) else [bool(alone)] * len(levels)
    for level, flag in zip(levels, flags, strict=True):
        if level["attention"]:
            level["attention"]["cells"] &= not flag


def _rules_diffusers(arguments: Mapping[str, Any]) -> list[Rule]:
    _plain(arguments)
    return diffusers_keys.rules(arguments)


def _config_diffusers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    _plain(arguments)
    levels, embedding, middle = arguments["levels"], arguments["embedding"], arguments["middle"]
    kinds = [level["attention"] or middle for level in levels]
    down = ["CrossAttnDownBlock2D" if level["attention"] else "DownBlock2D" for level in levels]
    pooled, width = arguments.get("pooled_dim"), embedding.get("size_width", _SIZE_WIDTH)
    told: dict[str, Any] = {}
    if pooled is not None:
        told = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": width,
            "projection_class_embeddings_input_dim": pooled + embedding["size_numbers"] * width,
        }
    return {
        **diffusers_keys.config(arguments, down),
        "cross_attention_dim": arguments["context_dim"],
        "attention_head_dim": [kind["heads"] for kind in kinds],
        "transformer_layers_per_block": [kind["depth"] for kind in kinds],
        "only_cross_attention": [not kind["cells"] for kind in kinds],
        "use_linear_projection": not arguments.get("_conv_projections"),
        "num_class_embeds": arguments.get("num_classes"),
        "time_embedding_dim": embedding["dim"],
        "act_fn": arguments["style"].get("activation", "silu"),
        **told,
    }


register(
    Format(
        "sd_official",
        "denoiser",
        "adm",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "middle_block.1.proj_in.weight",
            "middle_block.1.transformer_blocks.{i}.attn2.to_k.weight",
            "out.2.weight",
        ),
        prefixes=("", "model.diffusion_model."),
    )
)
register(
    Format(
        "sd_diffusers",
        "denoiser",
        "adm",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "time_embedding.linear_1.weight",
            "conv_in.weight",
            "mid_block.attentions.{i}.proj_in.weight",
            "mid_block.attentions.{i}.transformer_blocks.{j}.attn2.to_k.weight",
            "conv_out.weight",
        ),
        classes=("UNet2DConditionModel",),
    )
)

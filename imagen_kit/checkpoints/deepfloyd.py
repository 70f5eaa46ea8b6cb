"""DeepFloyd IF: the .bin files of deep-floyd/IF (all stages), and diffusers' UNet2DConditionModel for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints import diffusers_keys, guided_keys
from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rule
from imagen_kit.errors import KitError

_SKIP_SCALE = 0.7071  # the code's own constant for 1/sqrt(2)


def _assembled(
    arguments: dict[str, Any],
    noised: bool,
    text: tuple[int, int],
    heads: Mapping[str, int],
    style: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of ``adm`` for either format: text (width of the encoder's tokens, of the attention's)."""
    for channels, attention in guided_keys.attentions(arguments):
        attention["head_dim"] = heads["head_dim"]
        if channels % heads["head_dim"] or text[0] % heads["text_heads"]:
            raise KitError(
                f"heads of width {heads['head_dim']}, {heads['text_heads']} heads of the text, do not fit "
                f"{channels} channels and text of width {text[0]}; give the config of this IF"
            )
    arguments["style"] |= style
    arguments["embedding"] |= {"text_width": text[1], "text_heads": heads["text_heads"]}
    if noised:
        own = arguments["in_channels"] // 2
        arguments |= {"in_channels": own, "low_res_channels": own}
    return {**arguments, "context_dim": text[0]}


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    arguments = guided_keys.structure(shapes)
    noised = shapes.has("aug_proj.{i}.{end}")
    config = config or {"scale_skip_connection": noised}
    style = {
        "activation": diffusers_keys.activation({"act_fn": config.get("activation", "gelu")}),
        "skip_scale": _SKIP_SCALE if config.get("scale_skip_connection", False) else 1.0,
    }
    heads = {
        "head_dim": int(config.get("num_head_channels", 64)),
        "text_heads": int(config.get("att_pool_heads", 64)),
    }
    if heads["head_dim"] == -1:
        raise KitError("num_head_channels -1: only heads of a given width are IF's")
    for level in arguments["levels"]:
        level["dropout"] = float(config.get("dropout") or 0.0)
    text = (shapes["encoder_pooling.0.bias"][0], shapes["encoder_proj.bias"][0])
    return _assembled(arguments, noised, text, heads, style)


def _rules_official(arguments: Mapping[str, Any]) -> list[Rule]:
    _plain(arguments)
    guided_keys.require_plain(arguments)
    return guided_keys.rules(arguments, per_head=True)


def _plain(arguments: Mapping[str, Any]) -> None:
    if not (arguments.get("embedding") or {}).get("text_width"):
        raise KitError("this adm does not pool its text as IF does, so it has no IF format")


_FIXED: dict[str, tuple[Any, ...]] = {
    "cross_attention_norm": ("group_norm",),
    "addition_embed_type": ("text",),
    "encoder_hid_dim_type": ("text_proj", None),
    "class_embed_type": ("timestep", None),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    **diffusers_keys.FIXED,
}


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    arguments = diffusers_keys.structure(shapes, config)
    noised = shapes.has("class_embedding.{part}.{end}")
    if config is None:
        style: dict[str, Any] = {"activation": "gelu", "skip_scale": _SKIP_SCALE if noised else 1.0}
        heads = {"head_dim": 64, "text_heads": 64}  # of all published stages
    else:
        diffusers_keys.require(config, _FIXED)
        style = {
            "skip_scale": diffusers_keys.skip_scale(config),
        }
        if bool(config.get("resnet_skip_time_act")) != (config.get("time_embedding_act_fn") is not None):
            raise KitError("resnet_skip_time_act and time_embedding_act_fn: only both or neither are IF's")
        heads = {
            "head_dim": int(config.get("attention_head_dim", 8)),
            "text_heads": int(config.get("addition_embed_type_num_heads", 64)),
        }
    text = (shapes["add_embedding.norm1.bias"][0], shapes["encoder_hid_proj.bias"][0])
    return _assembled(arguments, noised, text, heads, style)


def _rules_diffusers(arguments: Mapping[str, Any]) -> list[Rule]:
    _plain(arguments)
    return diffusers_keys.rules(arguments)


def _config_diffusers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    _plain(arguments)
    style, embedding = arguments["style"], arguments["embedding"]
    scale, noised = style.get("skip_scale", 1.0), bool(arguments.get("low_res_channels"))
    factor = {1.0: 1.0, _SKIP_SCALE: 1 / _SKIP_SCALE}.get(scale, 1 / scale)
    middle, plain = arguments["middle"], "ResnetDownsampleBlock2D"
    down = ["SimpleCrossAttnDownBlock2D" if level["attention"] else plain for level in arguments["levels"]]
    alone = [bool(level["attention"]) and not level["attention"]["cells"] for level in arguments["levels"]]
    return {
        **diffusers_keys.config(arguments, down),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": embedding["text_width"],
        "cross_attention_norm": "group_norm",
        "attention_head_dim": middle["head_dim"],
        "only_cross_attention": alone,
        "mid_block_only_cross_attention": not middle["cells"],
        "encoder_hid_dim": arguments["context_dim"],
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": embedding["text_heads"],
        "class_embed_type": "timestep" if noised else None,
        "act_fn": style["activation"],
        "time_embedding_dim": embedding["dim"],
        "time_embedding_act_fn": style["activation"] if noised else None,
        "resnet_skip_time_act": noised,
        "resnet_out_scale_factor": factor,
        "mid_block_scale_factor": factor,
    }


register(
    Format(
        "if_official",
        "denoiser",
        "adm",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "middle_block.1.encoder_kv.weight",
            "encoder_proj.weight",
            "encoder_pooling.1.q_proj.weight",
            "out.2.weight",
        ),
    )
)
register(
    Format(
        "if_diffusers",
        "denoiser",
        "adm",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "time_embedding.linear_1.weight",
            "conv_in.weight",
            "encoder_hid_proj.weight",
            "add_embedding.pool.q_proj.weight",
            "mid_block.attentions.{i}.add_k_proj.weight",
        ),
        classes=("UNet2DConditionModel",),
    )
)

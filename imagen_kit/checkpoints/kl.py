"""The KL autoencoder: LDM's names (Stable Diffusion's single files, FLUX's ae.safetensors) and diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Ignore, Rename, Reshape, Rule
from imagen_kit.errors import KitError

_GROUPS = 32


def _scaling(shapes: Shapes, channels: int, levels: int) -> tuple[float, float]:
    """(scale, shift) of the published autoencoder; what else the file holds tells those apart that look alike."""
    if channels == 16:
        sd3 = shapes.whole.has("model.diffusion_model.joint_blocks.{i}.{rest}")
        return (1.5305, 0.0609) if sd3 else (0.3611, 0.1159)
    if levels == 3:
        return 0.08333, 0.0  # the 4× upscaler's
    sdxl = shapes.whole.has("conditioner.embedders.{i}.{rest}")
    return (0.13025, 0.0) if sdxl else (0.18215, 0.0)


def _configure_official(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    levels = shapes.count("encoder.down.{i}.{rest}")
    channels = shapes["decoder.conv_in.weight"][1]
    scale, shift = _scaling(shapes, channels, levels)
    return _kwargs(
        channels,
        [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        shapes.count("encoder.down.0.block.{i}.{rest}"),
        _GROUPS,
        float(config.get("scale_factor", scale)),
        float(config.get("shift_factor", shift)),
        shapes.has("quant_conv.{rest}"),
        shapes.has("encoder.mid.attn_1.{rest}"),
        shapes["encoder.conv_in.weight"],
    )


def _kwargs(
    channels: int,
    widths: list[int],
    blocks: int,
    groups: int,
    scale: float,
    shift: float,
    quant: bool,
    attend: bool,
    first: tuple[int, ...],
) -> dict[str, Any]:
    """Arguments of ``kl``; ``first`` is the shape of the encoder's first convolution."""
    return {
        "channels": channels,
        "widths": widths,
        "blocks": blocks,
        "groups": groups,
        "scale": scale,
        "shift": shift,
        "quant": quant,
        "attend": attend,
        "picture_channels": first[1],
        "stem": first[0] if first[0] != widths[0] else None,
    }


def _rules_official(kwargs: Mapping[str, Any]) -> list[Rule]:
    if kwargs.get("groups", _GROUPS) != _GROUPS:
        raise KitError(f"this kl's norms have {kwargs['groups']} groups; LDM files always mean {_GROUPS}")
    return [Ignore("loss.{rest}")]  # the discriminator of a training checkpoint


def _configure_diffusers(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    config = config or {}
    for key, value in (("act_fn", "silu"), ("latents_mean", None), ("latents_std", None)):
        if config.get(key, value) != value:
            raise KitError(
                f"{key} {config[key]!r} is not that of a KL autoencoder of Stable Diffusion's kind"
            )
    levels = shapes.count("encoder.down_blocks.{i}.{rest}")
    if shapes.has("encoder.down_blocks.{i}.attentions.{rest}"):
        raise KitError("attention outside of the middle block is not that of Stable Diffusion's autoencoders")
    channels = shapes["decoder.conv_in.weight"][1]
    widths = config.get("block_out_channels") or [
        shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
    ]
    scale, shift = _scaling(shapes, channels, levels)
    if config:  # diffusers' own defaults
        scale, shift = float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor") or 0.0)
    return _kwargs(
        channels,
        list(widths),
        int(config.get("layers_per_block") or shapes.count("encoder.down_blocks.0.resnets.{i}.{rest}")),
        int(config.get("norm_num_groups", _GROUPS)),
        scale,
        shift,
        bool(config.get("use_quant_conv", shapes.has("quant_conv.{rest}"))),
        bool(config.get("mid_block_add_attention", shapes.has("encoder.mid_block.attentions.{i}.{rest}"))),
        shapes["encoder.conv_in.weight"],
    )


def _rules_diffusers(kwargs: Mapping[str, Any]) -> list[Rule]:
    if kwargs.get("stem"):
        raise KitError(
            "this kl's first convolution is of another width than its first level; diffusers' never is"
        )
    last = len(kwargs["widths"]) - 1
    rules: list[Rule] = []
    for side in ("encoder", "decoder"):
        middle, mid = f"{side}.mid_block", f"{side}.mid"
        rules += [
            Rename(f"{side}.conv_norm_out.{{end}}", f"{side}.norm_out.{{end}}"),
            Rename(f"{middle}.resnets.0.{{part}}.{{end}}", f"{mid}.block_1.{{part}}.{{end}}"),
            Rename(f"{middle}.resnets.1.{{part}}.{{end}}", f"{mid}.block_2.{{part}}.{{end}}"),
            Rename(f"{middle}.attentions.0.group_norm.{{end}}", f"{mid}.attn_1.norm.{{end}}"),
        ]
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            there, here = f"{middle}.attentions.0.{theirs}", f"{mid}.attn_1.{ours}"
            rules += [
                Reshape(f"{there}.weight", f"{here}.weight", (0, -1), (0, -1, 1, 1)),
                Rename(f"{there}.bias", f"{here}.bias"),
            ]
    for i in range(last + 1):
        levels = (
            (f"encoder.down_blocks.{i}", f"encoder.down.{i}"),
            (f"decoder.up_blocks.{last - i}", f"decoder.up.{i}"),
        )
        for there, here in levels:
            rules += [
                Rename(
                    f"{there}.resnets.{{j}}.conv_shortcut.{{end}}", f"{here}.block.{{j}}.nin_shortcut.{{end}}"
                ),
                Rename(f"{there}.resnets.{{j}}.{{part}}.{{end}}", f"{here}.block.{{j}}.{{part}}.{{end}}"),
                Rename(f"{there}.downsamplers.0.conv.{{end}}", f"{here}.downsample.conv.{{end}}"),
                Rename(f"{there}.upsamplers.0.conv.{{end}}", f"{here}.upsample.conv.{{end}}"),
            ]
    return rules


def _config_diffusers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    levels = len(kwargs["widths"])
    return {
        "in_channels": kwargs["picture_channels"],
        "out_channels": kwargs["picture_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(kwargs["widths"]),
        "layers_per_block": kwargs["blocks"],
        "act_fn": "silu",
        "latent_channels": kwargs["channels"],
        "norm_num_groups": kwargs["groups"],
        "scaling_factor": kwargs["scale"],
        "shift_factor": kwargs["shift"] or None,
        "use_quant_conv": kwargs["quant"],
        "use_post_quant_conv": kwargs["quant"],
        "mid_block_add_attention": kwargs["attend"],
    }


register(
    Format(
        "kl_official",
        "codec",
        "kl",
        "official",
        _configure_official,
        _rules_official,
        has=(
            "encoder.down.{i}.block.{j}.conv1.weight",
            "encoder.conv_out.weight",
            "decoder.up.{i}.block.{j}.conv1.weight",
            "decoder.conv_in.weight",
        ),
        prefixes=("", "first_stage_model.", "vae."),
    )
)
register(
    Format(
        "kl_diffusers",
        "codec",
        "kl",
        "diffusers",
        _configure_diffusers,
        _rules_diffusers,
        _config_diffusers,
        has=(
            "encoder.down_blocks.{i}.resnets.{j}.conv1.weight",
            "encoder.conv_out.weight",
            "decoder.up_blocks.{i}.resnets.{j}.conv1.weight",
            "decoder.conv_in.weight",
        ),
        classes=("AutoencoderKL",),
        aliases=tuple(
            (
                "{side}.mid_block.attentions.0." + old + ".{end}",
                "{side}.mid_block.attentions.0." + new + ".{end}",
            )
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
        ),
    )
)

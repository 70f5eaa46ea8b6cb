"""ADM: the .pt files of openai/guided-diffusion, and others that its U-Net trained (LSUN, unconditional LDM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagen_kit.checkpoints import guided_keys
from imagen_kit.checkpoints.formats import Config, Format, Shapes, register
from imagen_kit.checkpoints.rules import Rule
from imagen_kit.errors import KitError

# What the published files' shapes do not tell, by the widths of their levels and the number of those that attend;
# all others have heads of width 64, no dropout and the first of the two orders of q, k and v.
_PUBLISHED: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {
    ((192, 384, 576, 768), 3): {"dropout": 0.1, "use_new_attention_order": True},
    ((256, 256, 512, 768, 1024), 3): {"num_head_channels": -1, "num_heads": 4},
    ((192, 192, 384, 384, 768, 768), 3): {"num_head_channels": -1, "num_heads": 4},
}


def _configure(shapes: Shapes, config: Config | None) -> dict[str, Any]:
    arguments = guided_keys.structure(shapes)
    levels, total = arguments["levels"], arguments["in_channels"]
    if config is None:
        widths = tuple(level["channels"] for level in levels)
        attended = sum(bool(level["attention"]) for level in levels)
        config = {"num_head_channels": 64, **_PUBLISHED.get((widths, attended), {})}
        if any(width % 64 for width, _ in guided_keys.attentions(arguments)):
            raise KitError(
                f"levels of {', '.join(map(str, widths))} channels are of no published ADM; give its config"
            )
    # The published up-samplers take two RGB pictures; their config counts the channels of one.
    own = int(config.get("in_channels", 3 if total == 6 else total))
    heads, width = int(config.get("num_heads", 1)), int(config.get("num_head_channels", -1))
    if config.get("num_heads_upsample", -1) not in (-1, heads, None) and width == -1:
        raise KitError("num_heads_upsample: only as many heads on the way up as on the way down")
    for _, attention in guided_keys.attentions(arguments):
        attention.update({"heads": heads} if width == -1 else {"head_dim": width})
    for level in levels:
        level["dropout"] = float(config.get("dropout", 0.0))
    arguments["embedding"]["low_res_noised"] = False
    return {
        **arguments,
        "in_channels": own,
        "num_classes": guided_keys.classes(shapes, "label_emb.weight", config.get("num_classes")),
        "low_res_channels": total - own,
        "_per_head": not config.get("use_new_attention_order", False),
    }


def _rules(arguments: Mapping[str, Any]) -> list[Rule]:
    if arguments.get("context_dim"):
        raise KitError("this adm reads text, which guided-diffusion's format cannot say")
    guided_keys.require_plain(arguments)
    return guided_keys.rules(arguments, arguments.get("_per_head", True))


register(
    Format(
        "adm_official",
        "denoiser",
        "adm",
        "official",
        _configure,
        _rules,
        has=(
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "middle_block.0.in_layers.2.weight",
            "middle_block.1.qkv.weight",
            "out.2.weight",
        ),
        lacks=("middle_block.1.encoder_kv.weight", "encoder_pooling.{rest}"),
        prefixes=("", "model.diffusion_model."),
    )
)

"""Constructor arguments read off a network that is there, as checkpoint formats want them.

A format's rules and config follow from the arguments in full, whereas a network may have been made from a size's
name, from a recipe or by hand; its modules tell them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from imagen_kit.checkpoints.loading import Origin
from imagen_kit.denoisers.layers.blocks import AttentionBlock, ResBlock, Shrink
from imagen_kit.denoisers.layers.spatial import SpatialTransformer
from imagen_kit.errors import KitError

_SD1 = 768  # text width of Stable Diffusion 1, whose projections are stored as convolutions


def origin(network: nn.Module) -> Origin:
    """What ``network`` is; the one it was loaded with, where it came from a checkpoint.

    Raises:
        KitError: a network of a kind that no community format knows.
    """
    loaded = getattr(network, "checkpoint_origin", None)
    if loaded is not None:
        return loaded
    kind = getattr(getattr(network, "inputs", None), "kind", "kl" if hasattr(network, "quant_conv") else None)
    if kind not in READERS:
        raise KitError(
            f"a {type(network).__name__} has no community format; those that have are {', '.join(READERS)}"
        )
    return Origin("codec" if kind == "kl" else "denoiser", kind, READERS[kind](network))


def _adm(network: Any) -> dict[str, Any]:
    inputs, told, style = network.inputs, network.told, network.style
    last = len(network.down) - 1
    plain = [
        unit.attention
        for units in (*network.down, [network.middle])
        for unit in units
        if isinstance(unit.attention, AttentionBlock)
    ]
    one = told.text_width is None and all(block.head_dim == block.out.out_features for block in plain)
    levels = []
    for i, units in enumerate(network.down):
        level = {
            "channels": units[0].res.conv2.out_channels,
            "blocks": len(units),
            "attention": _attention(units[0].attention, one),
            "dropout": units[0].res.dropout.p,
        }
        kind = _resample(network.shrink[i]) if i < last else style.resample
        levels.append(level if kind == style.resample else {**level, "resample": kind})
    return {
        "in_channels": inputs.in_channels,
        "out_channels": network.out_channels,
        "levels": levels,
        "middle": _attention(network.middle.attention, one),
        "style": dict(vars(style)),
        "embedding": {
            **vars(told),
            "dim": network.embed_dim,
            "frequencies": network.time.frequencies,
        },
        "context_dim": inputs.context_dim,
        "pooled_dim": inputs.pooled_dim,
        "num_classes": inputs.num_classes,
        "low_res_channels": inputs.low_res_channels,
        "_conv_projections": inputs.context_dim == _SD1,
    }


def _resample(shrink: nn.Module) -> str:
    if isinstance(shrink, ResBlock):
        return "residual"
    return "asymmetric" if isinstance(shrink, Shrink) and shrink.asymmetric else "conv"


def _attention(block: nn.Module | None, one_head: bool) -> dict[str, Any] | bool:
    """The fields of ``skeleton.Attention``; ``one_head`` where every plain attention has a single one."""
    if isinstance(block, SpatialTransformer):
        first: Any = block.transformer_blocks[0]
        return {
            "kind": "transformer",
            "heads": first.attn1.to_q.out_features // first.attn1.head_dim,
            "depth": len(block.transformer_blocks),
            "cells": first.cells,
        }
    if isinstance(block, AttentionBlock):
        heads = {"heads": 1} if one_head else {"head_dim": block.head_dim}
        return {
            "kind": "plain",
            "cells": block.cells,
            "norm": not isinstance(block.norm, nn.Identity),
            **heads,
        }
    return False


def _dit(network: Any) -> dict[str, Any]:
    inputs, first, own = network.inputs, network.blocks[0], network.embedders
    embedder = network.t_embedder if own is None else own[0].t_embedder
    table = network.y_embedder if own is None else own[0].y_embedder
    return {
        **_transformer(network, network.blocks, first.attn.heads),
        "learn_sigma": network.out_channels == 2 * inputs.in_channels,
        "context_dim": inputs.context_dim,
        "num_classes": inputs.num_classes,
        "low_res_channels": inputs.low_res_channels,
        "details": {
            "frequency_shift": embedder.shift,
            "mlp_norm_eps": first.norm2.eps,
            "mlp_ratio": first.mlp.fc1.out_features / network.width,
            "null_class": table is None or table.embedding_table.num_embeddings > inputs.num_classes,
            "block_embedders": own is not None,
        },
    }


def _transformer(network: Any, blocks: Any, heads: int) -> dict[str, Any]:
    """What the transformers have in common."""
    return {
        "in_channels": network.inputs.in_channels,
        "patch_size": network.patch_size,
        "width": network.final_layer.linear.in_features,
        "depth": len(blocks),
        "heads": heads,
    }


def _pixart(network: Any) -> dict[str, Any]:
    inputs, first = network.inputs, network.blocks[0]
    null = network.y_embedder.y_embedding
    return {
        **_transformer(network, network.blocks, first.attn.heads),
        "learn_sigma": network.out_channels == 2 * inputs.in_channels,
        "context_dim": inputs.context_dim,
        "sizes": bool(inputs.size_numbers),
        "null_tokens": 0 if null is None else len(null),
        "details": {
            "mlp_ratio": first.mlp.fc1.out_features / network.width,
            "grid": network.grid,
            "interpolation": network.interpolation,
        },
    }


def _mmdit(network: Any) -> dict[str, Any]:
    blocks = network.joint_blocks
    first = blocks[0].x_block
    width = first.attn.qkv.in_features
    return {
        **_transformer(network, blocks, width // first.attn.head_dim),
        "out_channels": network.out_channels,
        "context_dim": network.inputs.context_dim,
        "pooled_dim": network.inputs.pooled_dim,
        "details": {
            "qk_norm": first.attn.ln_q is not None,
            "dual_layers": [i for i, block in enumerate(blocks) if block.x_block.attn2 is not None],
            "mlp_ratio": first.mlp.fc1.out_features / width,
            "grid": network.grid,
        },
    }


def _flux(network: Any) -> dict[str, Any]:
    first = network.double_blocks[0]
    width = first.img_attn.qkv.in_features
    shared = _transformer(network, network.double_blocks, width // first.img_attn.head_dim)
    patch = shared.pop("patch_size")
    return {
        **shared,
        "out_channels": network.out_channels,
        "single_depth": len(network.single_blocks),
        "context_dim": network.inputs.context_dim,
        "pooled_dim": network.inputs.pooled_dim,
        "guidance": network.guidance_in is not None,
        "details": {
            "patch_size": patch,
            "mlp_ratio": first.img_mlp.fc1.out_features / width,
            "qkv_bias": first.img_attn.qkv.bias is not None,
            "axes": network.axes,
            "theta": network.theta,
        },
    }


def _kl(codec: Any) -> dict[str, Any]:
    encoder, decoder = codec.encoder, codec.decoder
    widths = [level.block[-1].conv2.out_channels for level in encoder.down]
    stem = encoder.conv_in.out_channels
    return {
        "channels": codec.channels,
        "widths": widths,
        "blocks": len(encoder.down[0].block),
        "groups": decoder.norm_out.num_groups,
        "scale": codec.scale,
        "shift": codec.shift,
        "quant": codec.quant_conv is not None,
        "attend": not isinstance(encoder.mid.attn_1, nn.Identity),
        "picture_channels": codec.picture_channels,
        "stem": None if stem == widths[0] else stem,
    }


READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adm": _adm,
    "dit": _dit,
    "pixart": _pixart,
    "mmdit": _mmdit,
    "flux": _flux,
    "kl": _kl,
}

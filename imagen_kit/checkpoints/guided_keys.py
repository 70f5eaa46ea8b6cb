"""Tensor names of guided-diffusion's U-Net, which IF and Stable Diffusion's single files share, and of ``adm``.

There the blocks stand in one row, ``input_blocks.{n}``, ``middle_block``, ``output_blocks.{n}``, each a little list:
a residual block, perhaps an attention, perhaps what changes the side. Here they are told apart by level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imagen_kit.checkpoints.formats import Shapes
from imagen_kit.checkpoints.rules import Rename, Reshape, Rule, Transform
from imagen_kit.errors import KitError

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "embed",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}
TRANSFORMER = {
    "norm": "norm",
    "transformer_blocks.{k}.attn1.to_out.0": "transformer_blocks.{k}.attn1.to_out",
    "transformer_blocks.{k}.attn2.to_out.0": "transformer_blocks.{k}.attn2.to_out",
    "transformer_blocks.{k}.ff.net.0.proj": "transformer_blocks.{k}.ff.proj",
    "transformer_blocks.{k}.ff.net.2": "transformer_blocks.{k}.ff.out",
}
OUTSIDE = {
    "time_embed.{i}": "time.mlp.{i}",
    "input_blocks.0.0": "stem",
    "out.0": "norm_out",
    "out.2": "head",
    "label_emb.0.{i}": "micro.{i}",
    "label_emb": "labels",
    "aug_proj.{i}": "low_res_level.mlp.{i}",
    "encoder_proj": "text_project",
    "encoder_pooling.0": "text_pool.norm1",
    "encoder_pooling.2": "text_pool.proj",
    "encoder_pooling.3": "text_pool.norm2",
    "encoder_pooling.1": "text_pool.pool",
}


@dataclass(frozen=True)
class Block:
    """One block of the row: where it stands there and here, and its attention, if any."""

    theirs: str
    ours: str
    attention: Mapping[str, Any] | None = None
    width: int = 0


def structure(shapes: Shapes) -> dict[str, Any]:
    """Arguments of ``adm`` that the shapes tell; the attentions still lack their heads.

    The way up tells everything: each of its levels ends in what enlarges the picture.
    """
    members: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in shapes:
        row, *path = name.split(".")
        if row == "output_blocks" and len(path) > 2 and path[0].isdigit() and path[1].isdigit():
            members[int(path[0])][int(path[1])].add(path[2])
    levels: list[dict[str, Any]] = []
    level: dict[str, Any] = {}
    for n in range(1 + max(members, default=-1)):
        where = f"output_blocks.{n}"
        if not level:
            width = shapes[f"{where}.0.out_layers.3.weight"][0]
            level = {"channels": width, "blocks": -1, "attention": False, "dropout": 0.0}
            levels.insert(0, level)
        level["blocks"] += 1
        last = members[n][max(members[n])]
        ends = max(members[n]) > 0 and bool(last & {"conv", "in_layers", "out_layers", "emb_layers"})
        if not level["attention"] and len(members[n]) > 1 + ends:
            level["attention"] = _attention(shapes, f"{where}.1", level["channels"])
        if ends:
            level = {}
    coarsest = levels[-1]["channels"]
    rows = shapes["middle_block.0.emb_layers.1.bias"][0] // coarsest
    plain = shapes.has("output_blocks.{i}.{j}.conv.{rest}") or shapes.has("input_blocks.{i}.0.op.{rest}")
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "levels": levels,
        "middle": _attention(shapes, "middle_block.1", coarsest),
        "style": {
            "activation": "silu",
            "modulation": "scale_shift" if rows == 2 else "shift",
            "resample": "conv" if plain else "residual",
            "groups": 32,
            "eps": 1e-5,
        },
        "embedding": {
            "dim": shapes["time_embed.2.bias"][0],
            "frequencies": shapes["time_embed.0.weight"][1],
            "shift": 0.0,
            "sin_first": False,
        },
    }


def _attention(shapes: Shapes, where: str, channels: int) -> dict[str, Any]:
    depth = shapes.count(f"{where}.transformer_blocks.{{k}}.{{rest}}", "k")
    if depth:
        source = shapes[f"{where}.transformer_blocks.0.attn1.to_k.weight"][1]
        return {"kind": "transformer", "depth": depth, "cells": source == channels}
    return {"kind": "plain", "cells": shapes[f"{where}.qkv.bias"][0] == 3 * channels, "norm": True}


def classes(shapes: Shapes, name: str, told: Any) -> int | None:
    """Number of classes: what the config tells, since a file may lack the table, or the table's rows."""
    return int(told) if told is not None else shapes.get(name, (None,))[0]


def attentions(arguments: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Width and attention of every level that has one, and of the middle."""
    for level in arguments["levels"]:
        if level["attention"]:
            yield level["channels"], level["attention"]
    if arguments["middle"]:
        yield arguments["levels"][-1]["channels"], arguments["middle"]


def blocks(arguments: Mapping[str, Any]) -> Iterator[Block]:
    """All residual blocks and all that change the side, in guided-diffusion's order."""
    levels, n = arguments["levels"], 0
    narrow = arguments["style"]["resample"] != "residual"
    for i, level in enumerate(levels):
        for j in range(level["blocks"]):
            n += 1
            yield Block(f"input_blocks.{n}", f"down.{i}.{j}", level["attention"] or None, level["channels"])
        if i < len(levels) - 1:
            n += 1
            yield Block(f"input_blocks.{n}.0" + ".op" * narrow, f"shrink.{i}")
    n = 0
    for i, level in enumerate(reversed(levels)):
        attention = level["attention"] or None
        for j in range(level["blocks"] + 1):
            yield Block(f"output_blocks.{n}", f"up.{i}.{j}", attention, level["channels"])
            n += 1
        if i < len(levels) - 1:
            place = 2 if attention else 1
            yield Block(f"output_blocks.{n - 1}.{place}" + ".conv" * narrow, f"grow.{i}")


def require_plain(arguments: Mapping[str, Any]) -> None:
    """KitError where a network computes something that guided-diffusion's U-Net does not."""
    style, embedding = arguments["style"], arguments.get("embedding") or {}
    own = [style.get("resample"), *(level.get("resample") for level in arguments["levels"])]
    for what, value, usual in (
        ("change of sides", "asymmetric" in own or any(own[1:]), False),
        ("groups", style.get("groups"), 32),
        ("eps", style.get("eps", 1e-5), 1e-5),
        ("frequency shift", float(embedding.get("shift", 0)), 0.0),
        ("order of sinusoids", bool(embedding.get("sin_first", False)), False),
    ):
        if value != usual:
            raise KitError(f"this adm's {what} is not that of guided-diffusion, whose format cannot say so")


def rules(arguments: Mapping[str, Any], per_head: bool) -> list[Rule]:
    """The rules between the two.

    Args:
        arguments: of ``adm``.
        per_head: whether q, k and v stand together head by head ("legacy" order; IF), or as three blocks of all
            heads, as ours do.
    """
    made: list[Rule] = []
    for block in blocks(arguments):
        if block.width:
            made += _residual(f"{block.theirs}.0", f"{block.ours}.res")
            if block.attention:
                made += _attended(
                    f"{block.theirs}.1",
                    f"{block.ours}.attention",
                    block.width,
                    block.attention,
                    per_head,
                    arguments,
                )
        elif block.theirs.endswith((".op", ".conv")):
            made.append(Rename(f"{block.theirs}.{{end}}", f"{block.ours}.{{end}}"))
        else:
            made += _residual(block.theirs, block.ours)
    made += _residual("middle_block.0", "middle.res")
    if arguments["middle"]:
        width = arguments["levels"][-1]["channels"]
        made += _attended(
            "middle_block.1", "middle.attention", width, arguments["middle"], per_head, arguments
        )
    made += _residual("middle_block.2", "middle.after")
    return made + [Rename(f"{theirs}.{{rest}}", f"{ours}.{{rest}}") for theirs, ours in OUTSIDE.items()]


def _residual(theirs: str, ours: str) -> list[Rule]:
    return [Rename(f"{theirs}.{a}.{{end}}", f"{ours}.{b}.{{end}}") for a, b in RESIDUAL.items()]


def _attended(
    theirs: str,
    ours: str,
    width: int,
    attention: Mapping[str, Any],
    per_head: bool,
    arguments: Mapping[str, Any],
) -> list[Rule]:
    if attention["kind"] == "transformer":
        return transformer(theirs, ours, bool(arguments.get("_conv_projections")))
    heads = attention.get("heads") or width // attention["head_dim"]
    parts = 3 if attention["cells"] else 1
    made: list[Rule] = [
        Rename(f"{theirs}.norm.{{end}}", f"{ours}.norm.{{end}}"),
        Rename(f"{theirs}.norm_encoder.{{end}}", f"{ours}.context_norm.{{end}}"),
        Reshape(f"{theirs}.proj_out.weight", f"{ours}.out.weight", (0, 0, 1), (0, 0)),
        Rename(f"{theirs}.proj_out.bias", f"{ours}.out.bias"),
    ]
    for a, b, count in (("qkv", "qkv", parts), ("encoder_kv", "context", 2)):
        for end, tail in (("weight", (1,)), ("bias", ())):
            names = (f"{theirs}.{a}.{end}", f"{ours}.{b}.{end}")
            made.append(_by_heads(*names, count, heads if per_head else 1, tail))
    return made


def _by_heads(theirs: str, ours: str, parts: int, heads: int, tail: tuple[int, ...]) -> Rule:
    """[head][part][channel] (and convolution axes of length 1) ↔ [part][head][channel]."""

    def forward(x: Tensor) -> Tensor:
        whole, rest = x.shape[0], x.shape[1 : x.ndim - len(tail)]
        if x.shape[x.ndim - len(tail) :] != tail:
            raise ValueError("not a convolution of side 1")
        return x.reshape(heads, parts, -1, *rest).transpose(0, 1).reshape(whole, *rest)

    def inverse(x: Tensor) -> Tensor:
        return x.reshape(parts, heads, -1, *x.shape[1:]).transpose(0, 1).reshape(*x.shape, *tail)

    return Transform(theirs, ours, forward, inverse)


def transformer(theirs: str, ours: str, convolutions: bool) -> list[Rule]:
    """The rules of one spatial transformer, whose names diffusers kept; its projections may be convolutions."""
    made: list[Rule] = [
        Rename(f"{theirs}.{a}.{{end}}", f"{ours}.{b}.{{end}}") for a, b in TRANSFORMER.items()
    ]
    if convolutions:
        for name in ("proj_in.weight", "proj_out.weight"):
            made.append(Reshape(f"{theirs}.{name}", f"{ours}.{name}", (0, 0, 1, 1), (0, 0)))
    return [*made, Rename(f"{theirs}.{{rest}}", f"{ours}.{{rest}}")]

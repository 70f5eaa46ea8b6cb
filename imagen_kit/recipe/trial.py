"""One evaluation of a stage's network without its weights: whether it can be, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from imagen_kit.conditioning import Cond
from imagen_kit.errors import Fault
from imagen_kit.hollow import hollow
from imagen_kit.recipe.counting import Operations
from imagen_kit.recipe.spec import StageSpec

AT_ONCE = 4e10  # parameters times pixels, so more than the multiplications, that a CPU does while one blinks


def evaluate(
    module: nn.Module,
    stage: StageSpec,
    known: Mapping[str, Any],
    options: Mapping[str, Any],
    classes: int | None = None,
    tokens: int = 2,
) -> None:
    """Call ``module`` as sampling one picture does; raises what it objects to.

    Args:
        module: the stage's network, on the meta device, or small and on the CPU: evaluated there, which is
            quicker than torch's sums on the meta device. A larger one is moved to the meta device.
        stage: its part of the recipe.
        known: ``check.dimensions`` of the stage.
        options: the arguments it was built with.
        classes: number of class labels, where prompts are labels.
        tokens: of the text.
    """
    side, channels, low_res = known["image_size"], known["in_channels"], known["low_res_channels"]
    needs = getattr(module, "inputs", None)
    width = getattr(needs, "context_dim", options.get("context_dim"))
    pooled = getattr(needs, "pooled_dim", options.get("pooled_dim"))
    told, noise = stage.told, stage.low_res.told if low_res else None
    count = sum(p.numel() for p in module.parameters())
    if count * side**2 > AT_ONCE:
        module.to("meta")
    where = next((p.device for p in module.parameters()), torch.device("meta"))
    with hollow() if where.type == "meta" else nullcontext(), torch.no_grad():
        cond = Cond(
            tokens=torch.zeros(1, tokens, width) if width and classes is None else None,
            mask=torch.ones(1, tokens, dtype=torch.bool) if width and classes is None else None,
            pooled=torch.zeros(1, pooled) if pooled and classes is None else None,
            labels=torch.zeros(1, dtype=torch.int64) if classes is not None or noise == "label" else None,
            low_res=torch.zeros(1, low_res, side, side) if low_res else None,
            low_res_level=torch.ones(1) if noise == "level" else None,
            size=None if told.size is None else torch.ones(1, len(told.size)),
            guidance=None if told.guidance is None else torch.ones(1),
        )
        module(torch.zeros(1, channels, side, side), torch.ones(1), cond)


def told_faults(module: nn.Module, stage: StageSpec, path: str, classes: int | None) -> Iterator[Fault]:
    """Whether the network listens to the numbers and the labels that the recipe tells it."""
    needs = getattr(module, "inputs", None)
    if needs is None:
        return
    size, wanted = stage.told.size, needs.size_numbers
    if size is not None and len(size) != wanted:
        rule = f"must be {wanted} numbers" if wanted else "is nothing that this network is told; leave it out"
        yield Fault(f"{path}.size", f"{rule}, not {len(size)}" if wanted else rule)
    if stage.low_res.told == "label" and needs.num_classes is None:
        yield Fault(path.replace("told", "low_res.told"), "must be level: this network reads no labels")
    if classes is not None and needs.num_classes != classes:
        yield Fault("labels.classes", f"is {classes}, but the {needs.kind} of {path} has {needs.num_classes}")


def flops(
    module: nn.Module,
    stage: StageSpec,
    known: Mapping[str, Any],
    options: Mapping[str, Any],
    classes: int | None,
    tokens: int,
) -> int | None:
    """Floating-point operations of one evaluation, a multiply-add being two; None where it cannot be tried."""
    try:
        with Operations() as counter:
            evaluate(module, stage, known, options, classes, tokens)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        return None
    return counter.flops

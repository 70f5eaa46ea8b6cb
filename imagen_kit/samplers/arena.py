"""Runs on few numbers: every slot is a row of one buffer, every sum one vector-matrix product.

Below some thousand numbers a step costs its kernel launches, whatever they compute. With the slots of a run in
the order they are filled, a row's terms lie shortly before its state, so that a state is one product of a vector
that was made beforehand with those rows, and noise is drawn where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagen_kit.samplers.tableau import Denoise, Noise, working_dtype

if TYPE_CHECKING:
    from imagen_kit.samplers.execution import Plan

#: Most numbers of a state, bytes of a run's buffer, and rows that a sum may read.
SMALL, BYTES, SPAN = 1 << 13, 1 << 22, 32
#: Most multiplications of a sum. From 9,216 on OpenBLAS, numpy's usual BLAS, wakes its own threads, which go on
#: spinning after the product and take the processors from the network's.
QUIET = 9215


class Placed(NamedTuple):
    """One operation of a plan, with rows of the buffer in place of slots.

    Attributes:
        draws: rows to fill with noise first.
        weights: (span,) weights of the rows before the state; None where the state is there already.
        state: row of the state.
        step, t, also: as in ``Operation``.
        outputs: rows of the answers, None for one that is never read.
    """

    draws: tuple[int, ...]
    weights: np.ndarray | None
    state: int
    step: int | None
    t: float | None
    also: tuple[str, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where the slots of a plan lie: one after another as they are filled, behind ``span`` rows of zeros.

    Attributes:
        placed: the plan's operations.
        span: rows that the sum of a state reads, those before it.
        slots: number of slots that are read.
    """

    placed: tuple[Placed, ...]
    span: int
    slots: int


def fits(plan: Plan, x: Tensor) -> bool:
    """Whether a run of the plan on x is one for this module."""
    if x.device.type != "cpu" or not 0 < x.numel() <= SMALL or torch.is_grad_enabled() or plan.batched:
        return False
    work = working_dtype(x)
    made = layout(plan, work)
    if made.span * x.numel() > QUIET:
        return False
    return made.span <= SPAN and (made.span + made.slots) * x.numel() * work.itemsize <= BYTES


def layout(plan: Plan, dtype: torch.dtype) -> Layout:
    """The layout of a plan, remembered by it."""
    if dtype not in plan.layouts:
        plan.layouts[dtype] = _lay_out(plan, np.dtype(str(dtype).removeprefix("torch.")))
    return plan.layouts[dtype]


def _lay_out(plan: Plan, dtype: np.dtype) -> Layout:
    read = {slot for op in plan.operations for slot in (*op.terms, op.state)}
    row = {0: 0}
    for op in plan.operations:
        for slot in (*op.draws, op.state, *op.outputs):
            if slot in read:
                row.setdefault(slot, len(row))
    span = max((row[op.state] - row[slot] for op in plan.operations for slot in op.terms), default=1)
    placed = []
    for op in plan.operations:
        weights = np.zeros(span) if op.terms else None
        for slot, weight in zip(op.terms, op.weights, strict=True):
            assert weights is not None
            weights[row[slot] - row[op.state]] = weight
        draws, outputs = tuple(row[slot] for slot in op.draws), tuple(row.get(slot) for slot in op.outputs)
        exact = None if weights is None else weights.astype(dtype)
        placed.append(Placed(draws, exact, row[op.state], op.step, op.t, op.also, outputs))
    return Layout(tuple(placed), span, len(row))


def iterate(plan: Plan, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``Plan.iterate`` for a run that ``fits``."""
    dtype, work = x.dtype, working_dtype(x)
    made, parts, fill = layout(plan, work), plan.parts_of(denoise), getattr(noise, "fill_", None)
    span, narrow = made.span, dtype != work
    buffer = torch.zeros(span + made.slots, x.numel(), dtype=work)
    array = buffer.numpy()  # the same memory: a row of an array costs a sixth of a row of a tensor
    sums, rows = list(array[span:]), buffer[span:].view(-1, *x.shape).unbind()
    rows[0].copy_(x)
    x0 = x
    for draws, weights, state, step, t, also, outputs in made.placed:
        for row in draws:
            if fill is None:
                rows[row].copy_(noise())
            else:
                fill(rows[row])
        if weights is not None:
            weights.dot(array[state : state + span], sums[state])  # the ``span`` rows before the state
        told = rows[state].to(dtype) if narrow else rows[state]
        if step is not None:
            yield step, told, x0
        if t is not None:
            if also:
                answers = parts(told, t, also)
                x0 = answers[0]
                for place, answer in zip(outputs, answers, strict=True):
                    if place is not None:
                        rows[place].copy_(answer)
            else:
                x0 = denoise(told, t)
                if outputs[0] is not None:
                    rows[outputs[0]].copy_(x0)

"""One run in which every sample of the batch has a grid of its own: weights and times become tensors (b,)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.execution import Operation, Plan
from imagen_kit.samplers.tableau import Row, Tableau, working_dtype


def plan(tableaus: Sequence[Tableau], x: Tensor) -> Plan:
    """The plan that runs sample i by tableau i.

    Weights and times go to x's device here, once; the run reads nothing back.

    Args:
        tableaus: one a sample, of the same sampler and schedule.
        x: (b, ...) the noisy start.

    Raises:
        KitError: tableaus that do not do the same in every row (evaluate, draw noise, end a step).
    """
    first = tableaus[0]
    if all(tableau is first for tableau in tableaus):
        return first.plan
    distinct = {id(tableau): tableau for tableau in tableaus}
    for other in distinct.values():
        if _shape(other) != _shape(first):
            raise KitError(
                f"sampler {first.sampler!r} does not take the same course on these grids (evaluations and "
                "noise must fall in the same places); sample them in batches of one course"
            )
    rows = [_union([tableau.rows[i] for tableau in tableaus]) for i in range(len(first.rows))]
    base = Plan.of([row for row, _ in rows], first.sampler)
    weights = _on_device([line for _, lines in rows for line in lines], x, working_dtype(x))
    weights = [weight.view(-1, *(1,) * (x.ndim - 1)) for weight in weights]
    evaluated = [i for i, row in enumerate(first.rows) if row.t is not None]
    native = [[tableau.rows[i].t or 0.0 for tableau in tableaus] for i in evaluated]
    told = dict(zip(evaluated, _on_device(native, x, _exact(x)), strict=True))
    operations: list[Operation] = []
    for i, (operation, (_, lines)) in enumerate(zip(base.operations, rows, strict=True)):
        mine, weights = weights[: len(lines)], weights[len(lines) :]
        operations.append(replace(operation, weights=tuple(mine), t=told.get(i)))
    return replace(base, operations=tuple(operations))


def times(tableaus: Sequence[Tableau], x: Tensor) -> Tensor:
    """(b, n) native times of the grids, on x's device."""
    return torch.tensor([tableau.times for tableau in tableaus], dtype=_exact(x)).to(x.device)


def _exact(x: Tensor) -> torch.dtype:
    """float64 where x's device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _shape(tableau: Tableau) -> list[tuple[object, ...]]:
    """What all samples of a batch must have in common."""
    return [
        (
            row.state,
            row.computes,
            row.t is None,
            row.outputs,
            row.also,
            row.step,
            [slot for slot, _ in row.weights if slot.startswith("n")],
        )
        for row in tableau.rows
    ]


def _union(rows: list[Row]) -> tuple[Row, list[list[float]]]:
    """A row with every slot that one of the rows reads, and a line of weights (b,) for each of its slots."""
    slots = list(dict.fromkeys(slot for row in rows for slot, _ in row.weights))
    row = replace(rows[0], weights=tuple((slot, 1.0) for slot in slots))
    if not row.computes:
        return row, []
    tables = [dict(row.weights) for row in rows]
    return row, [[table.get(slot, 0.0) for table in tables] for slot in slots]


def _on_device(lines: list[list[float]], x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(b,) tensors on x's device, moved together."""
    if not lines:
        return []
    return list(torch.tensor(lines, dtype=torch.float64).to(dtype).to(x.device).unbind())

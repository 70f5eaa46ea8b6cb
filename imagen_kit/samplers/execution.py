"""Running a tableau: a flat plan of (slot numbers, weights), one weighted sum a row.

A sampler's step is bound by memory, so a row should pass over it once: read every term, write the state. What
comes nearest depends on where the tensors are and how large they are, and is decided once a run: few numbers
go to ``arena``, CUDA tensors to ``triton_sum``, all others to ``weighted_sum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers import arena
from imagen_kit.samplers.tableau import Callback, Denoise, Noise, Row, working_dtype

#: A row's weight of one slot; (b, 1, ...) where the samples of a batch have grids of their own.
Weight = float | Tensor
#: (tensors, weights) -> Σ weight · tensor, in the working dtype.
Sum = Callable[[Sequence[Tensor], Sequence[Weight]], Tensor]


@dataclass(frozen=True, slots=True)
class Operation:
    """One row, with slots as numbers.

    Attributes:
        draws: slots to fill with noise first.
        terms: slots of the sum; () where the state is there already.
        weights: theirs.
        state: slot of the state.
        step: sampling step that the state ends, or None.
        t: time of the evaluation (a float, or (b,)), None where there is none.
        outputs: slots of its answers; those that no row reads are left out.
        also: further predictions that the evaluation gives.
        dead: slots that no later row reads.
    """

    draws: tuple[int, ...]
    terms: tuple[int, ...]
    weights: tuple[Weight, ...]
    state: int
    step: int | None
    t: Any
    outputs: tuple[int, ...]
    also: tuple[str, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Rows made ready to run.

    Attributes:
        operations: one a row.
        slots: number of slots; slot 0 is the noisy start.
        sampler: the sampler's name, for messages.
    """

    operations: tuple[Operation, ...]
    slots: int
    sampler: str

    @cached_property
    def batched(self) -> bool:
        """Whether weights are tensors."""
        return any(isinstance(weight, Tensor) for op in self.operations for weight in op.weights)

    @cached_property
    def layouts(self) -> dict[torch.dtype, arena.Layout]:
        """What ``arena`` has worked out for this plan."""
        return {}

    @classmethod
    def of(cls, rows: Sequence[Row], sampler: str) -> Plan:
        """Number the slots, and find where each is used last."""
        number = {"x": 0}
        for row in rows:
            for slot in (*(slot for slot, _ in row.weights), row.state, *row.outputs):
                number.setdefault(slot, len(number))
        last = {slot: i for i, row in enumerate(rows) for slot in (*dict(row.weights), row.state)}
        filled, operations = {"x"}, []
        for i, row in enumerate(rows):
            used = dict(row.weights) if row.computes else {}
            draws = [slot for slot in used if slot not in filled]  # only noises are not filled by a row
            filled.update(draws, (row.state,), row.outputs)
            gone = {*used, row.state, *row.outputs}
            operations.append(
                Operation(
                    draws=tuple(number[slot] for slot in draws),
                    terms=tuple(number[slot] for slot in used),
                    weights=tuple(used.values()),
                    state=number[row.state],
                    step=row.step,
                    t=row.t,
                    outputs=tuple(number[slot] for slot in row.outputs),
                    also=row.also,
                    dead=tuple(number[slot] for slot in gone if last.get(slot, -1) <= i),
                )
            )
        return cls(tuple(operations), len(number), sampler)

    def iterate(self, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See ``Tableau.iterate``."""
        if arena.fits(self, x):
            return arena.iterate(self, denoise, x, noise)
        return self._iterate(denoise, x, noise)

    def _iterate(self, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The general run: every slot a tensor of its own, dropped after its last use."""
        dtype, work = x.dtype, working_dtype(x)
        narrow = dtype != work
        parts = self.parts_of(denoise)
        total = chooser(x, work)
        widen = not getattr(total, "takes_any_dtype", False)
        slots: list[Any] = [None] * self.slots
        slots[0] = x.to(work) if widen else x
        x0: Any = x
        answers: Any = None
        for op in self.operations:
            for slot in op.draws:
                drawn = noise()
                slots[slot] = drawn if drawn.dtype == work or not widen else drawn.to(work)
            if op.terms:
                state = total([slots[slot] for slot in op.terms], op.weights)
                slots[op.state] = state
            else:
                state = slots[op.state]
            told = state.to(dtype) if narrow else state
            if op.step is not None:
                yield op.step, told, x0
            for slot in op.dead:  # before the evaluation, whose memory they would add to
                slots[slot] = None
            if op.t is not None:
                x0 = answers = None
                answers = parts(told, op.t, op.also) if op.also else (denoise(told, op.t),)
                x0 = answers[0]
                for slot, answer in zip(op.outputs, answers, strict=True):
                    if slot not in op.dead:
                        slots[slot] = answer if answer.dtype == work or not widen else answer.to(work)

    def run(self, denoise: Denoise, x: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
        """See ``Tableau.run``."""
        for step, state, x0 in self.iterate(denoise, x, noise):
            if callback is not None:
                callback(step, state, x0)
            x = state
            del x0  # the run goes on without it
        return x

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of all further predictions that rows ask for."""
        return tuple(dict.fromkeys(name for op in self.operations for name in op.also))

    def parts_of(self, denoise: Denoise) -> Callable[..., tuple[Tensor, ...]]:
        """``denoise.parts``, where a row needs it."""
        if self.parts and not hasattr(denoise, "parts"):
            wants = " with renoise='uncond'" if "uncond" in self.parts else ""
            raise KitError(
                f"sampler {self.sampler!r}{wants} needs a guided denoiser (guidance cfg or cfg_pp) that also "
                f"gives the prediction {', '.join(map(repr, self.parts))}"
            )
        return getattr(denoise, "parts", None)  # type: ignore[return-value]


def chooser(x: Tensor, work: torch.dtype) -> Sum:
    """The weighted sum for tensors like ``x``: one kernel a row on CUDA, two terms a pass elsewhere."""
    if x.device.type == "cuda" and work == torch.float32:
        from imagen_kit.samplers import triton_sum

        if triton_sum.available():
            return triton_sum.weighted_sum
    return weighted_sum


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """Σ weight · tensor of tensors of one dtype: the first two terms in one pass, every further one in place.

    ``addr`` (beta M + alpha u vᵀ) with M and u columns and v = (1) is the one elementwise kernel that scales
    both of its terms: it reads each once and writes once. No term has a temporary.
    """
    first, *rest = tensors
    numbers = [weight for weight in weights if not isinstance(weight, Tensor)]
    if not rest or len(numbers) < len(weights) or not all(tensor.is_contiguous() for tensor in tensors):
        return _one_by_one(tensors, weights)
    second = rest[0].view(-1)
    one = torch.ones(1, dtype=second.dtype, device=second.device)
    total = torch.addr(first.view(-1, 1), second, one, beta=numbers[0], alpha=numbers[1])
    total = total.view(first.shape)
    for tensor, weight in zip(rest[1:], numbers[2:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _one_by_one(tensors: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """A product, then a multiply-add in place for every further term: any layout, any weights."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if isinstance(weight, Tensor):
            total.addcmul_(tensor, weight)
        else:
            total.add_(tensor, alpha=weight)
    return total

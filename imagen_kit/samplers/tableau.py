"""Samplers as tableaus: which slots to combine, with which weights, before every network evaluation.

A linear form is a dict of slots (the noisy start ``x``, states ``s1 …``, network answers ``d0 …``, noises
``n0 …``) with float64 coefficients. A sampler's formula run on forms leaves a list of rows; running the rows
on tensors needs nothing but weighted sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor, Tensor], object]


class Form:
    """A linear combination of slots; supports + and - with forms, * and / with numbers."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[str, float]):
        self.terms = terms

    def __add__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for slot, weight in other.terms.items():
            terms[slot] = terms.get(slot, 0.0) + weight
        return Form(terms)

    def __mul__(self, factor: float) -> Form:
        return Form({slot: weight * factor for slot, weight in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Form) -> Form:
        return self + other * -1.0

    def __neg__(self) -> Form:
        return self * -1.0

    def __truediv__(self, divisor: float) -> Form:
        return Form({slot: weight / divisor for slot, weight in self.terms.items()})

    def __repr__(self) -> str:
        return " + ".join(f"{weight:.6g} {slot}" for slot, weight in self.terms.items()) or "0"

    @property
    def finite(self) -> bool:
        """Whether every coefficient is a finite number."""
        return all(math.isfinite(weight) for weight in self.terms.values())

    @property
    def slot(self) -> str | None:
        """The slot this form simply names, or None when there is something to compute."""
        if len(self.terms) == 1:
            ((slot, weight),) = self.terms.items()
            if weight == 1.0:
                return slot
        return None


@dataclass(frozen=True)
class Row:
    """Combine slots to a state, then (where ``t`` is given) evaluate the network there.

    Attributes:
        state: name of the slot the combination fills.
        weights: (slot, weight) pairs; one pair naming ``state`` itself where nothing is to be computed.
        t: native time of the evaluation, None where there is none.
        output: slot of the network's answer (x0), None where there is none.
        step: number of the sampling step this state ends, counted from 0; None for intermediate states.
    """

    state: str
    weights: tuple[tuple[str, float], ...]
    t: float | None = None
    output: str | None = None
    step: int | None = None

    def __str__(self) -> str:
        combined = repr(Form(dict(self.weights)))
        left = "" if self.weights == ((self.state, 1.0),) else f"{self.state} = {combined}"
        right = "" if self.t is None else f"{self.output} = x0({self.state}, t={self.t:.6g})"
        return "; ".join(part for part in (left, right) if part)


@dataclass(frozen=True)
class Tableau:
    """A sampler on one schedule and one grid: everything but the network and the tensors.

    Attributes:
        rows: what to do, in order; the last row's state is the sample.
        order: global order of accuracy of the sampler's deterministic part.
        times: native times of the grid, from the noisy start to the end.
        start: (alpha, sigma) of the state sampling starts from.
        end: (alpha, sigma) of the sample, (1, 0) when it goes to the clean end.
        prior_std: standard deviation of the Gaussian to start from.
    """

    rows: tuple[Row, ...]
    order: int
    times: tuple[float, ...]
    start: tuple[float, float]
    end: tuple[float, float]
    prior_std: float

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return sum(row.t is not None for row in self.rows)

    @property
    def noises(self) -> int:
        """Number of Gaussian tensors drawn."""
        return len({slot for row in self.rows for slot, _ in row.weights if slot.startswith("n")})

    @cached_property
    def _last_use(self) -> dict[str, int]:
        return {slot: i for i, row in enumerate(self.rows) for slot, _ in row.weights}

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def iterate(self, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the rows; after every sampling step yield (step, state, latest x0), state in x's dtype.

        Args:
            denoise: (x, t) -> x0, both of x's shape and dtype, t a Python float.
            x: the noisy start, any shape; float16 and bfloat16 states are kept and summed in float32.
            noise: () -> tensor like x, called once a noise term, in order.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        slots: dict[str, Tensor] = {"x": x.to(work)}
        x0 = x
        for i, row in enumerate(self.rows):
            for slot, _ in row.weights:
                if slot not in slots:  # only noises are not filled by an earlier row
                    slots[slot] = noise()
            state = weighted_sum([(weight, slots[slot]) for slot, weight in row.weights], work)
            slots[row.state] = state
            if row.step is not None:
                yield row.step, state.to(x.dtype), x0
            if row.t is not None and row.output is not None:
                x0 = denoise(state.to(x.dtype), row.t)
                slots[row.output] = x0
            slots = {slot: value for slot, value in slots.items() if self._last_use.get(slot, -1) > i}

    def run(self, denoise: Denoise, x: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
        """Run all rows and return the sample, of x's shape and dtype; arguments as in ``iterate``."""
        for step, state, x0 in self.iterate(denoise, x, noise):
            if callback is not None:
                callback(step, state, x0)
            x = state
        return x


def weighted_sum(terms: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    """Σ weight · tensor, summed in ``dtype``; weights are kernel arguments, so nothing waits for a device."""
    (weight, first), *rest = terms
    total = first.to(dtype)
    total = total * weight if weight != 1.0 or rest else total
    for weight, tensor in rest:
        total.add_(tensor, alpha=weight)  # the kernel widens lower-precision terms itself
    return total

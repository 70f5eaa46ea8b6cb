"""Samplers as tableaus: which slots to combine, with which weights, before every network evaluation.

A linear form is a dict of slots (the noisy start ``x``, states ``s1 …``, network answers ``d0 …``, noises
``n0 …``) with float64 coefficients. A sampler's formula run on forms leaves a list of rows; running the rows
on tensors needs nothing but weighted sums (``imagen_kit.samplers.execution``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imagen_kit.samplers.execution import Plan

#: (x, t) -> x0. t is a Python float, or a (b,) tensor where the samples of a batch have grids of their own.
Denoise = Callable[[Tensor, Any], Tensor]
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
        outputs: slots of the network's answers: x0 first, then one for every name in ``also``; () where
            there is no evaluation.
        also: names of further predictions of x0 that the evaluation must give, e.g. ``("uncond",)``.
        step: number of the sampling step this state ends, counted from 0; None for intermediate states.
    """

    state: str
    weights: tuple[tuple[str, float], ...]
    t: float | None = None
    outputs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    step: int | None = None

    @property
    def computes(self) -> bool:
        """Whether the state is a new combination, rather than a slot filled before."""
        return self.weights != ((self.state, 1.0),)

    def __str__(self) -> str:
        left = f"{self.state} = {Form(dict(self.weights))!r}" if self.computes else ""
        names = ", ".join(("x0", *(f"x0 {name}" for name in self.also)))
        right = "" if self.t is None else f"{', '.join(self.outputs)} = {names}({self.state}, t={self.t:.6g})"
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
        sampler: the sampler's name, for messages.
    """

    rows: tuple[Row, ...]
    order: int
    times: tuple[float, ...]
    start: tuple[float, float]
    end: tuple[float, float]
    prior_std: float
    sampler: str = "custom"

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return sum(row.t is not None for row in self.rows)

    @property
    def noises(self) -> int:
        """Number of Gaussian tensors drawn."""
        return len({slot for row in self.rows for slot, _ in row.weights if slot.startswith("n")})

    @cached_property
    def plan(self) -> Plan:
        """The rows as flat lists of slot numbers and weights: what a run goes through."""
        from imagen_kit.samplers.execution import Plan

        return Plan.of(self.rows, self.sampler)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def iterate(self, denoise: Denoise, x: Tensor, noise: Noise) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the rows; after every sampling step yield (step, state, latest x0), state in x's dtype.

        Nothing in a run waits for the device: times and weights are numbers of the host, known beforehand.

        Args:
            denoise: (x, t) -> x0, both of x's shape and dtype, t a Python float. Rows that need further
                predictions call ``denoise.parts(x, t, names)``, which returns x0 and those.
            x: the noisy start, any shape; float16 and bfloat16 states are kept and summed in float32.
            noise: () -> tensor like x, called once a noise term, in order.

        Raises:
            KitError: a row needs further predictions, and ``denoise`` has no ``parts``.
        """
        return self.plan.iterate(denoise, x, noise)

    def run(self, denoise: Denoise, x: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
        """Run all rows and return the sample, of x's shape and dtype; arguments as in ``iterate``."""
        return self.plan.run(denoise, x, noise, callback)

    def fold(
        self,
        schedule: Any,
        prediction: str,
        *,
        guidance_scale: float | None = None,
        sigma_data: float = 0.5,
    ) -> Tableau:
        """The same sampler over the network's raw outputs: x0 = a x + b output enters the weights.

        Saves the pass over memory that turns every output into x0 (with classifier-free guidance: the three
        passes that mix two outputs). The ``denoise`` given to ``run`` must then return the raw output for
        (x, t); with ``guidance_scale`` it must have ``parts(x, t, ("uncond",))``, which returns the raw
        conditional and unconditional outputs. Callbacks receive the raw output in place of x0.

        Args:
            schedule: the schedule the tableau was made for.
            prediction: what the network says; see ``imagen_kit.prediction``.
            guidance_scale: scale w of constant classifier-free guidance, uncond + w (cond - uncond).
            sigma_data: spread of the data, for ``edm``.

        Raises:
            KitError: unknown prediction, an output that does not determine x0 at some time of the grid, or
                guidance asked for of a tableau that uses the unconditional prediction in its own way.
        """
        from imagen_kit.samplers.fold import fold

        return fold(self, schedule, prediction, guidance_scale, sigma_data)


def working_dtype(x: Tensor) -> torch.dtype:
    """What states are kept and summed in: x's dtype, float32 for anything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def without_waste(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows without those that only compute a state which nothing reads (a corrector's last)."""
    kept: list[Row] = []
    read: set[str] = set()
    for row in reversed(rows):
        if row.step is not None or row.t is not None or row.state in read:
            kept.append(row)
            read.update(slot for slot, _ in row.weights)
    return tuple(reversed(kept))

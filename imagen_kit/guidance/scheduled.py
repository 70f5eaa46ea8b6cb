"""A guidance scale that changes along the run (Wang et al. 2024; Ho et al. 2022, Imagen Video)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance import register
from imagen_kit.guidance.base import Branch, Guidance, Step, Wrapper, build, number
from imagen_kit.guidance.vectors import cast

SHAPES = ("constant", "linear", "cosine", "oscillating")


@register(
    "scheduled",
    extra_evaluations="those of the strategy whose scale it changes; none where the scale is the neutral one",
    works_in="that of the strategy whose scale it changes",
)
@dataclass(frozen=True)
class Scheduled(Wrapper):
    """Any strategy with a scale, which depends on u, the part of the run's steps that are taken.

        constant     the strategy's own scale
        linear       other + (scale − other)·u
        cosine       other + (scale − other)·(1 − cos πu)/2
        oscillating  the strategy's own for ``hold`` steps, then ``other`` and its own by turns, as Imagen
                     Video samples (Ho et al. 2022, §2.6.2: 1 and 15)

    For CFG from other = 1, ``linear`` and ``cosine`` are the schedules 2w·u and w·(1 − cos πu) of Wang et al.
    2024, with w = (scale − 1)/2 the mean of their weight.

    Args:
        of: the strategy, or ``{"name": "cfg", "scale": 15.0}``.
        shape: see above.
        other: the other scale, lower or higher; None = the one at which the strategy does nothing.
        hold: steps before ``oscillating`` begins.

    Raises:
        KitError: a strategy without a scale, an unknown shape, a wrong number; when called, a run whose grid
            is not known.
    """

    of: Guidance | Mapping[str, Any] | float
    shape: str = "linear"
    other: float | None = None
    hold: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", build(self.of))
        if self.other is not None:
            number(self.other, "the other scale of a guidance schedule")
        if self.inner.with_scale(self._other) is None:
            raise KitError(f"guidance scheduled: {type(self.inner).__name__} has no scale to change")
        if self.shape not in SHAPES:
            raise KitError(unknown("guidance scale schedule", self.shape, SHAPES))
        if isinstance(self.hold, bool) or not isinstance(self.hold, int) or self.hold < 0:
            raise KitError(f"guidance schedule 'hold' must be a whole number from 0, got {self.hold!r}")

    @property
    def _other(self) -> float:
        return self.inner.neutral if self.other is None else self.other

    def _ends(self, weight: float | Tensor) -> list[Guidance]:
        """The strategies that a weight mixes: the one at the other scale, the one at its own, or both."""
        other = self.inner.with_scale(self._other)
        assert other is not None
        ends = [other, self.inner]
        if isinstance(weight, Tensor) or 0 < weight < 1:
            return ends
        return ends[1:] if weight else ends[:1]

    def weight(self, step: Step) -> float | Tensor:
        """Of the strategy's own scale against the other, in [0, 1]."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "oscillating":
            place = step.place
            if isinstance(place, Tensor):
                turns = (place + 1e-6).floor() - self.hold
                return ((turns < 0) | (turns.remainder(2) == 1)).to(place.dtype)
            turn = math.floor(place + 1e-6) - self.hold
            return float(turn < 0 or turn % 2 == 1)
        u = step.progress
        if self.shape == "linear":
            return u
        return (1 - (torch.cos(math.pi * u) if isinstance(u, Tensor) else math.cos(math.pi * u))) / 2

    @property
    def needs(self) -> tuple[Branch, ...]:
        return tuple(dict.fromkeys(branch for end in self._ends(0.5) for branch in end.needs))

    def reads(self, step: Step) -> tuple[Branch, ...]:
        read = (branch for end in self._ends(self.weight(step)) for branch in end.reads(step))
        return tuple(dict.fromkeys(read))

    def active(self, step: Step) -> bool | Tensor:
        every = [end.active(step) for end in self._ends(self.weight(step))]
        return every[0] if len(every) == 1 else every[0] | every[1]

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        # what a strategy adds is affine in its scale, so between two scales it is the mixture of both ends
        weight = self.weight(step)
        ends = []
        for end in self._ends(weight):
            when = end.active(step)
            after = guided if when is False else end.apply(guided, predictions, step)
            ends.append(torch.where(when, after, guided) if isinstance(when, Tensor) else after)
        if len(ends) == 1:
            return ends[0]
        return ends[0] + cast(weight, guided) * (ends[1] - ends[0])

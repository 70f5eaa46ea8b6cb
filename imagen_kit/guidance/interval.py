"""Guidance in a limited interval of noise levels (Kynkäänniemi et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import Branch, Guidance, Step, build, check_interval, inside


@register("interval", works_in="that of the strategy it limits")
@dataclass(frozen=True)
class Interval(Guidance):
    """Any strategy, acting only where low < position ≤ high; elsewhere what it needs is not evaluated.

    Args:
        of: the strategy, or ``{"name": "cfg", "scale": 2.0}``.
        low: lower bound, left out.
        high: upper bound, included.
        by: what is bounded: ``sigma`` (the noise-to-signal ratio sigma/alpha, as in the paper), ``log_snr``
            or native ``t``.

    Raises:
        KitError: unknown axis, bounds that are not numbers or not in order.
    """

    of: Guidance | Mapping[str, Any] | float
    low: float = -math.inf
    high: float = math.inf
    by: str = "sigma"

    def __post_init__(self) -> None:
        check_interval((self.low, self.high), self.by)
        object.__setattr__(self, "of", build(self.of))

    @property
    def inner(self) -> Guidance:
        """The strategy that is limited."""
        return build(self.of)

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.inner.space

    @property
    def needs(self) -> tuple[Branch, ...]:
        return self.inner.needs

    def active(self, step: Step) -> bool | Tensor:
        within, wanted = inside(step, self.low, self.high, self.by), self.inner.active(step)
        if within is False or wanted is False:
            return False
        return within & wanted

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return self.inner.apply(guided, predictions, step)

    def with_scale(self, scale: float) -> Interval | None:
        inner = self.inner.with_scale(scale)
        return None if inner is None else replace(self, of=inner)

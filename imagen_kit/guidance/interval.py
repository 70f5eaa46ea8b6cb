"""Guidance in a limited interval of noise levels (Kynkäänniemi et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import Guidance, Step, Wrapper, build, check_interval, inside


@register(
    "interval",
    extra_evaluations="those of the strategy it limits, 0 outside",
    works_in="that of the strategy it limits",
)
@dataclass(frozen=True)
class Interval(Wrapper):
    """Any strategy, acting only where low < position ≤ high; elsewhere what it needs is not evaluated.

    Args:
        of: the strategy, or ``{"name": "cfg", "scale": 2.0}``.
        low: lower bound, left out.
        high: upper bound, included.
        by: what is bounded: ``sigma`` (the noise-to-signal ratio sigma/alpha, as in the paper), ``log_snr``,
            native ``t``, or ``progress``, the fraction of steps taken (0 at the first evaluation; left out by
            a lower bound of 0).

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

    def active(self, step: Step) -> bool | Tensor:
        within, wanted = inside(step, self.low, self.high, self.by), self.inner.active(step)
        if within is False or wanted is False:
            return False
        return within & wanted

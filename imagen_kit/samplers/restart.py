"""Restart: an ODE solver that goes back up to a high noise level and down again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.edm import SOLVERS, ode_step, raise_noise
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

#: (steps of one way down, times, lowest and highest sigma / alpha).
Interval = tuple[int, int, float, float]


@register("restart", order=2, stochastic=True, evaluations="2 steps - 1 + 2 steps of each restart")
@dataclass(frozen=True, kw_only=True)
class Restart(Sampler):
    """Restart sampling (Xu et al. 2023, Algorithm 1), with Heun's method.

    On reaching r_low (r = sigma / alpha, y = x / alpha), K times over:

        y_high = y_low + sqrt(r_high² - r_low²) s_noise n,   then Heun's steps from r_high down to r_low.

    The way down is spaced as in EDM (exponent ``rho``). An interval starts at the grid point nearest to its
    low end in log r, which is then its low end; intervals that hold no point of the grid between its start
    and its end (as with one step) are left out, and so is one whose high end the schedule does not reach.

    Args:
        intervals: (steps, times, low, high) of each: steps of one way down, K, and the two sigma / alpha.
        s_noise: standard deviation of the noise.
        solver: ``heun``, or ``euler`` with one evaluation a step.
    """

    name: ClassVar[str] = "restart"
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 12

    spacing: str = "karras"
    intervals: Sequence[Interval] = ((9, 1, 0.1, 2.0),)
    s_noise: float = 1.0
    solver: str = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("s_noise", 0.0, math.inf)
        self._choice("solver", SOLVERS)
        if not isinstance(self.intervals, list | tuple) or not all(map(_interval, self.intervals)):
            raise KitError(
                "sampler 'restart': option 'intervals' must be a list of [steps, times, low, high], whole "
                f"numbers from 1 and sigma / alpha with 0 < low < high, not {self.intervals!r}"
            )
        object.__setattr__(self, "intervals", tuple(map(tuple, self.intervals)))

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.solver == "heun" else 1

    def solve(self, x: Form, run: Run) -> Form:
        restarts = self.places(run)
        for i, now, then in run.steps:
            x = run.keep(ode_step(x, now, then, run, self.solver))
            for steps, times, high in restarts.get(i + 1, []):
                for _ in range(times):
                    x = self.again(x, then, run, steps, high)
            x = run.step(x)
        return x

    def places(self, run: Run) -> dict[int, list[tuple[int, int, float]]]:
        """{number of the grid point: [(steps, times, high)]} of the intervals that the grid has room for."""
        found: dict[int, list[tuple[int, int, float]]] = {}
        inner = [(i, point) for i, point in enumerate(run.points) if 0 < i < len(run.points) - 1]
        for steps, times, low, high in self.intervals:
            if not inner:
                continue
            i, nearest = min(inner, key=lambda entry: abs(math.log(entry[1].ratio / low)))
            if nearest.ratio < high <= run.points[0].ratio:
                found.setdefault(i, []).append((steps, times, high))
        return found

    def again(self, x: Form, low: Point, run: Run, steps: int, high: float) -> Form:
        """One way up from ``low`` and down again."""
        levels = np.linspace(high ** (1 / self.rho), low.ratio ** (1 / self.rho), steps + 1) ** self.rho
        points = [*(run.point(-math.log(level)) for level in levels[:-1]), low]
        x = run.keep(raise_noise(x, low, points[0], self.s_noise * run.noise()))
        for now, then in pairwise(points):
            x = run.keep(ode_step(x, now, then, run, self.solver))
        return x


def _interval(entry: object) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        return False
    steps, times, low, high = entry
    whole = all(type(n) is int and n >= 1 for n in (steps, times))
    real = all(isinstance(r, int | float) and math.isfinite(r) for r in (low, high))
    return whole and real and 0 < low < high

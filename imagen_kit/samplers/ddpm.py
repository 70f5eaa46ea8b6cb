"""DDPM: ancestral sampling with a fixed or a learned variance."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers import grid as grids
from imagen_kit.samplers import register
from imagen_kit.samplers.asked import Asked
from imagen_kit.samplers.base import Generators, Run, Sampler, begin
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.nonlinear import no_tableau
from imagen_kit.samplers.tableau import Denoise, Form, Noise, Tableau, working_dtype
from imagen_kit.schedules.base import Schedule

VARIANCES = {"fixed_small": 0.0, "fixed_large": 1.0}
LEARNED = ("learned_range", "learned")


#: (log small, log large) of every step: numbers, or (n, 2, b) on the device
Spans = list[list[float]] | Tensor


@register("ddpm", order=1, stochastic=True, evaluations="steps", linear="unless the variance is learned")
@dataclass(frozen=True, kw_only=True)
class Ddpm(Sampler):
    """Ancestral sampling of Ho et al. 2020 (Algorithm 2, eq. 6-7), on any grid and schedule.

    On a coarser grid beta is that of the forward step between its times, as on the respaced chains of
    guided-diffusion, DiT and IF. The last step to the clean end draws nothing (Algorithm 2, line 3).

    Args:
        variance: log-interpolation between the posterior's variance (0, or "fixed_small") and that of the
            forward step, beta (1, or "fixed_large"); numbers between are the gamma of Imagen, section E.
            ``learned_range``: the network's v interpolates, log variance = f log beta + (1 - f) log small
            with f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15); ``learned``: v is the log variance. These
            two need a ``denoise`` with ``with_variance(x, t) -> (x0, v)`` and have no tableau.
    """

    name: ClassVar[str] = "ddpm"
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 250

    variance: str | float = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.variance, str):
            known = (*VARIANCES, *LEARNED)
            if self.variance not in known:
                raise KitError(
                    f"sampler 'ddpm': option 'variance' must be {', '.join(map(repr, known))} "
                    f"or a number from 0 to 1, not {self.variance!r}"
                )
        else:
            self._range("variance", 0.0, 1.0)

    @property
    def linear(self) -> bool:
        """Whether this sampler has a tableau: it has none with a learned variance."""
        return self.variance not in LEARNED

    @property
    def fixed(self) -> Ddpm:
        """The same sampler with the posterior's variance."""
        return replace(self, variance="fixed_small")

    def solve(self, x: Form, run: Run) -> Form:
        gamma = VARIANCES[self.variance] if isinstance(self.variance, str) else float(self.variance)
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            small, large = variances(now, then)
            kept = (then.sigma / now.sigma) ** 2
            mean = now.alpha / then.alpha * kept * x + then.alpha * large / now.sigma**2 * x0
            variance = large**gamma * small ** (1 - gamma) if then.sigma > 0 else 0.0
            x = run.step(mean + math.sqrt(variance) * run.noise())
        return x

    def trace(self, schedule: Schedule, points: list[Point]) -> Tableau:
        if not self.linear:
            raise no_tableau(self.name, f"with variance={self.variance!r} takes its noise from the network")
        return super().trace(schedule, points)

    def nfe(self, steps: int) -> int:
        return super().nfe(steps) if self.linear else self.fixed.nfe(steps)

    def _sample(self, denoise: Denoise, x: Tensor, schedule: Schedule, asked: Asked) -> Tensor:
        if self.linear:
            return super()._sample(denoise, x, schedule, asked)
        if not hasattr(denoise, "with_variance"):
            raise KitError(
                f"sampler 'ddpm' with variance={self.variance!r} needs a denoiser with a learned variance, "
                "denoise.with_variance(x, t); use variance='fixed_small' or 'fixed_large'"
            )
        grid: dict[str, Any] = {"timesteps": asked.timesteps, "sigmas": asked.sigmas}
        steps = self.fixed.budget(schedule, asked.steps, asked.timesteps, asked.sigmas, asked.nfe)
        spans = self._spans(x, schedule, steps, grid)
        learned = _Learned(denoise, asked.generator, asked.noise, spans, self.variance == "learned")
        rest = replace(asked, steps=steps, nfe=None, generator=None, noise=learned.noise)
        return self.fixed._sample(learned, x, schedule, rest)

    def _spans(self, x: Tensor, schedule: Schedule, steps: int | None, grid: dict[str, Any]) -> Spans:
        """Log of the small and of the large variance of every step; tensors (b,) where samples have grids."""
        rows = grids.each_sample(grid["timesteps"], grid["sigmas"], len(x) if x.ndim else 0)
        if rows is not None:
            which = "sigmas" if grid["timesteps"] is None else "timesteps"
            table = [_logs(self.points(schedule, steps, **{which: row})) for row in rows]
            return torch.tensor(table, dtype=torch.float64).permute(1, 2, 0).to(working_dtype(x)).to(x.device)
        if grid["timesteps"] is None and grid["sigmas"] is None:
            with contextlib.suppress(TypeError):  # a schedule that cannot be a key
                return _remembered(self, schedule, steps)
        return _logs(self.points(schedule, steps, **grid))


@functools.lru_cache(maxsize=256)
def _remembered(sampler: Ddpm, schedule: Schedule, steps: int | None) -> list[list[float]]:
    """Every run on a grid asks for the same numbers."""
    return _logs(sampler.points(schedule, steps))


def _logs(points: list[Point]) -> list[list[float]]:
    """(log small, log large) variance of every step."""
    pairs = [variances(*pair) for pair in pairwise(points)]
    return [[math.log(v) if v > 0 else -math.inf for v in pair] for pair in pairs]


def variances(now: Point, then: Point) -> tuple[float, float]:
    """(variance of the posterior q(x' | x, x0), beta of the forward step from ``then`` to ``now``)."""
    beta = now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2
    return beta * (then.sigma / now.sigma) ** 2, beta


class _Learned:
    """A run with a learned variance, seen as one with the posterior's: the noise is scaled by the network.

    mean + sqrt(variance) n = mean + sqrt(small) (sqrt(variance / small) n). Steps draw in order and once
    each, after the evaluation that says their variance, so that a count of draws tells the step.
    """

    def __init__(self, denoise: Any, generator: Generators | None, source: Noise, spans: Spans, is_log: bool):
        self._denoise, self._generator, self._source = denoise, generator, source
        self._spans, self._is_log = spans, is_log
        self._said: Tensor | None = None
        self._draws = 0

    def begin(self, times: Any, generator: Any, parts: Sequence[str]) -> _Learned:
        """Starts the run of the wrapped function with the caller's own generator."""
        self._denoise = begin(self._denoise, times, self._generator, parts)
        return self

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        x0, self._said = self._denoise.with_variance(x, t)
        return x0

    def noise(self) -> Tensor:
        """The next noise, times sqrt(variance / small)."""
        drawn = self._source()
        assert self._said is not None
        said = self._said.to(drawn.dtype)
        small, large = (
            span.view(-1, *(1,) * (said.ndim - 1)) if isinstance(span, Tensor) else span
            for span in self._spans[self._draws]
        )
        self._draws += 1
        log = said if self._is_log else small + (said + 1) / 2 * (large - small)
        return drawn * ((log - small) / 2).exp()

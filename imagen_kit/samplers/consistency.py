"""Samplers of distilled networks: latent consistency models (LCM) and trajectory consistency (TCD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ddim_step
from imagen_kit.samplers.asked import Grid
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form
from imagen_kit.schedules.base import Schedule


@dataclass(frozen=True, kw_only=True)
class Distilled(Sampler):
    """Samplers of networks that were distilled on a few of a discrete schedule's times.

    Args:
        original_steps: how many times the network was distilled on: k, 2k, ... T less 1 with k = T //
            original_steps. ``spacing="auto"`` takes evenly from these. None, another spacing or a continuous
            schedule: the usual grids.
    """

    default_steps: ClassVar[int] = 4

    original_steps: int | None = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.original_steps
        if known is not None and (type(known) is not int or known < 1):
            raise KitError(
                f"sampler {self.name!r}: option 'original_steps' must be a whole number from 1 or none, "
                f"not {known!r}"
            )

    def points(
        self,
        schedule: Schedule,
        steps: int | None = None,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
    ) -> list[Point]:
        explicit = timesteps is not None or sigmas is not None
        if explicit or self.spacing != "auto" or self.original_steps is None or not schedule.discrete:
            return super().points(schedule, steps, timesteps, sigmas)
        times = self.distilled(schedule, self.default_steps if steps is None else steps)
        return super().points(schedule, timesteps=[*times, 0.0] if self.final == "sigma_min" else times)

    def distilled(self, schedule: Schedule, steps: int) -> list[float]:
        """Evenly chosen times of the distillation, noisiest first (the published pipelines' rule)."""
        assert schedule.discrete is not None
        assert self.original_steps is not None
        if self.original_steps > schedule.discrete:
            raise KitError(
                f"sampler {self.name!r}: option 'original_steps' must be at most the schedule's "
                f"{schedule.discrete} times, not {self.original_steps}"
            )
        if not 1 <= steps <= self.original_steps:
            raise KitError(
                f"sampler {self.name!r}: steps must be from 1 to original_steps={self.original_steps}, "
                f"not {steps!r}"
            )
        skip = schedule.discrete // self.original_steps
        known = np.arange(self.original_steps, 0, -1) * skip - 1.0
        chosen = np.floor(np.linspace(0, len(known), steps, endpoint=False)).astype(int)
        return known[chosen].tolist()


@register("lcm", order=1, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Lcm(Distilled):
    """Multistep consistency sampling (Luo et al. 2023, Algorithm 3; Song et al. 2023, Algorithm 1).

    f = c_skip x + c_out x0 is the network's clean sample, and x' = alpha' f + sigma' n; the last step to
    sigma = 0 returns f. With s = ``timestep_scaling`` · t and d = 0.5:
    c_skip = d²/(s² + d²), c_out = s/sqrt(s² + d²) (Luo et al. 2023, Appendix C).

    It samples the data's distribution with a consistency function in place of x0, not with an ideal denoiser.

    Args:
        timestep_scaling: see above; t counts training steps (1000 t for flow). Large numbers: f = x0.
    """

    name: ClassVar[str] = "lcm"
    stochastic: ClassVar[bool] = True

    #: The standard deviation that the boundary condition assumes of the data.
    data_std: ClassVar[float] = 0.5

    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("timestep_scaling", 0.0, math.inf)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            scaled = self.timestep_scaling * now.t * run.schedule.time_scale
            length = math.hypot(scaled, self.data_std)
            skip, out = (self.data_std / length) ** 2, scaled / length
            clean = skip * x + out * run.denoise(x, now)
            x = run.step(then.alpha * clean + then.sigma * run.noise())
        return x


@register("tcd", order=1, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Tcd(Distilled):
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, Algorithm 4).

    From t along the trajectory to s = (1 - gamma) t', below the next time, and forward to t' with noise:

        x_s = alpha_s x0 + sigma_s noise(x),
        x' = alpha'/alpha_s x_s + sqrt(sigma'² - (alpha'/alpha_s sigma_s)²) n.

    Times of discrete schedules are rounded down.

    Args:
        gamma: 0 follows the trajectory (DDIM), 1 goes to the clean end and back as LCM does.
    """

    name: ClassVar[str] = "tcd"
    stochastic: ClassVar[bool] = True

    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("gamma", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            if then.sigma == 0:
                x = run.step(then.alpha * x0)
                continue
            below = self.below(then, run.schedule)
            forward = then.alpha / below.alpha
            variance = then.sigma**2 - (forward * below.sigma) ** 2
            landed = forward * ddim_step(x, x0, now, below)
            x = run.step(landed + math.sqrt(max(variance, 0.0)) * run.noise())
        return x

    def below(self, then: Point, schedule: Schedule) -> Point:
        """The point at (1 - gamma) t'; ``then`` itself with gamma = 0."""
        if self.gamma == 0:
            return then
        t = (1 - self.gamma) * then.t
        if schedule.discrete:
            t = float(math.floor(t + 1e-6))  # so that 0.7 · 90 is 63 whatever its last digit
        return Point(t, *schedule.alpha_sigma(t))

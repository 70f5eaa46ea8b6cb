"""k-diffusion's DPM-2: the midpoint method in sigma / alpha, with the midpoint taken in its logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ddim_step, noise_in, split
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

EVALUATIONS = "2 steps - 1 (2 steps with final='sigma_min')"


def midpoint_step(x: Form, now: Point, then: Point, run: Run) -> Form:
    """With r = sigma / alpha: Euler to sqrt(r r'), and from ``x`` to r' along the noise found there."""
    x0 = run.denoise(x, now)
    middle = run.point((now.lam + then.lam) / 2)
    half = ddim_step(x, x0, now, middle)
    slope = noise_in(half, run.denoise(half, middle), middle)
    return then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope)


@register("dpm2", order=2, stochastic=False, evaluations=EVALUATIONS)
@dataclass(frozen=True, kw_only=True)
class Dpm2(Sampler):
    """DPM-2 (KDPM2): midpoint method with the stage at the geometric mean of both noise levels.

    Karras et al. 2022, Algorithm 1, generalised as in their Appendix C.2.

    Two evaluations a step, one in a step to sigma = 0. It needs alpha > 0 at the start.
    """

    name: ClassVar[str] = "dpm2"
    order: ClassVar[int] = 2
    default_steps: ClassVar[int] = 10

    spacing: str = "log_snr"

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            if then.sigma == 0:
                x = run.step(ddim_step(x, run.denoise(x, now), now, then))
            else:
                x = run.step(midpoint_step(x, now, then, run))
        return x


@register("dpm2_ancestral", order=2, stochastic=True, evaluations=EVALUATIONS)
@dataclass(frozen=True, kw_only=True)
class Dpm2Ancestral(Sampler):
    """``dpm2`` to a level below the next one, and fresh noise back up to it (k-diffusion's "DPM2 a").

    Args:
        eta: share of the noise drawn anew, as in ``euler_ancestral``; 0 is ``dpm2``.
    """

    name: ClassVar[str] = "dpm2_ancestral"
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 10

    spacing: str = "log_snr"
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            if then.sigma == 0:
                x = run.step(ddim_step(x, run.denoise(x, now), now, then))
            else:
                down, share = split(now, then, self.eta)
                x = run.step(midpoint_step(x, now, down, run) + then.sigma * share * run.noise())
        return x

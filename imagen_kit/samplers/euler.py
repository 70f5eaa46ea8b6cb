"""Euler's method in sigma / alpha, plain and ancestral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ancestral_step, ddim_step
from imagen_kit.samplers.base import Run
from imagen_kit.samplers.renoise import Renoising
from imagen_kit.samplers.tableau import Form


@register("euler", order=1, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Euler(Renoising):
    """Euler's method on the probability-flow ODE in sigma / alpha (Karras et al. 2022, first-order Algorithm 1).

    d(x/alpha) / d(sigma/alpha) is the noise, so a step changes the share of x0 and of the noise: the same as
    DDIM with eta = 0, and as Euler's method along the velocity of a flow model.
    """

    name: ClassVar[str] = "euler"

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0, source = self.predict(x, now, run)
            x = run.step(ddim_step(x, x0, now, then, source))
        return x


@register("euler_ancestral", order=1, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Renoising):
    """Euler's method to a level below the next one, and fresh noise back up to it (k-diffusion's "Euler a").

    In r = sigma/alpha: up = eta r' sqrt(1 - (r'/r)²), down = sqrt(r'² - up²).

    Args:
        eta: share of the noise drawn anew; 0 is plain Euler, 1 the full ancestral step.
    """

    name: ClassVar[str] = "euler_ancestral"
    stochastic: ClassVar[bool] = True

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0, source = self.predict(x, now, run)
            x = run.step(ancestral_step(x, x0, now, then, self.eta, run, source))
        return x

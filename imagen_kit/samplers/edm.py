"""EDM's stochastic sampler: churn, then a step of Heun or Euler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ddim_step, noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

SOLVERS = ("heun", "euler")


def ode_step(x: Form, now: Point, then: Point, run: Run, solver: str) -> Form:
    """A step along the probability-flow ODE in sigma / alpha (Karras et al. 2022, Algorithm 1, lines 4-8).

    Euler's where ``solver`` says so, and in a step to sigma = 0.
    """
    x0 = run.denoise(x, now)
    euler = ddim_step(x, x0, now, then)
    if solver == "euler" or then.sigma == 0:
        return euler
    slope = (noise_in(x, x0, now) + noise_in(euler, run.denoise(euler, then), then)) / 2
    return then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope)


def raise_noise(x: Form, now: Point, to: Point, noise: Form) -> Form:
    """x at ``now`` brought to the higher noise of ``to``: alpha^ (y + sqrt(r^² - r²) n) with y = x / alpha."""
    added = math.sqrt(max(to.ratio**2 - now.ratio**2, 0.0))
    return to.alpha / now.alpha * x + to.alpha * added * noise


@register("edm", order=2, stochastic=True, evaluations="2 steps - 1 (steps with solver='euler')")
@dataclass(frozen=True, kw_only=True)
class Edm(Sampler):
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2).

    In r = sigma / alpha and y = x / alpha, with N steps:

        gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= r <= s_tmax, else 0
        r^ = (1 + gamma) r,   y^ = y + sqrt(r^² - r²) s_noise n,   then Heun's step from r^ to r'.

    No noise is added where r^ would lie above all that the schedule knows, nor to a start without signal.
    ``s_churn=0`` is ``heun``. It needs alpha > 0 at the start unless ``solver="euler"``.

    Args:
        s_churn: amount of noise over the whole run; the defaults are the paper's for ImageNet-64 (Table 5).
        s_tmin, s_tmax: sigma / alpha between which noise is added.
        s_noise: its standard deviation; above 1 it makes up for detail that the network loses.
        solver: ``heun``, or ``euler`` with one evaluation a step.
    """

    name: ClassVar[str] = "edm"
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 18

    spacing: str = "karras"
    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    solver: str = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("s_churn", "s_tmin", "s_noise"):
            self._range(option, 0.0, math.inf)
        if not isinstance(self.s_tmax, int | float) or not self.s_tmax >= self.s_tmin:
            raise KitError(f"sampler 'edm': option 's_tmax' must be at least s_tmin, not {self.s_tmax!r}")
        self._choice("solver", SOLVERS)

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.solver == "heun" else 1

    def solve(self, x: Form, run: Run) -> Form:
        most = run.schedule.domain[1]
        gamma = min(self.s_churn / (len(run.points) - 1), math.sqrt(2) - 1)
        for _, now, then in run.steps:
            if gamma > 0 and now.alpha > 0 and self.s_tmin <= now.ratio <= self.s_tmax:
                raised = run.point(now.lam - math.log1p(gamma))
                if raised.t < most:
                    x, now = raise_noise(x, now, raised, self.s_noise * run.noise()), raised
            x = run.step(ode_step(x, now, then, run, self.solver))
        return x

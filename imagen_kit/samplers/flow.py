"""Euler's and Heun's method along the velocity of flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


def place(at: Point) -> float:
    """u = sigma / (alpha + sigma): the flow time with the same sigma / alpha (t itself on ``flow``)."""
    return at.sigma / (at.alpha + at.sigma)


def velocity(x: Form, x0: Form, at: Point) -> Form:
    """noise - x0, the slope of x / (alpha + sigma) = (1 - u) x0 + u noise."""
    return noise_in(x, x0, at) - x0


def along(x: Form, slope: Form, now: Point, then: Point) -> Form:
    """From u to u' along a velocity; on ``flow`` x + (t' - t) v."""
    scale = then.alpha + then.sigma
    return scale * (x / (now.alpha + now.sigma) + (place(then) - place(now)) * slope)


@register("flow_euler", order=1, stochastic="with stochastic_sampling", evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class FlowEuler(Sampler):
    """Euler's method along the velocity (Liu et al. 2022; Lipman et al. 2022): x + (t' - t) v.

    On other schedules it goes along the straight line in sigma / (alpha + sigma); either way the same as
    ``euler``, without dividing by alpha.

    Args:
        stochastic_sampling: put back entirely fresh noise instead of the noise found, (1 - t') x0 + t' z.
    """

    name: ClassVar[str] = "flow_euler"

    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stochastic_sampling, bool):
            raise KitError(
                "sampler 'flow_euler': option 'stochastic_sampling' must be true or false, "
                f"not {self.stochastic_sampling!r}"
            )

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            if self.stochastic_sampling:
                x = run.step(then.alpha * x0 + then.sigma * run.noise())
            else:
                x = run.step(along(x, velocity(x, x0, now), now, then))
        return x


@register("flow_heun", order=2, stochastic=False, evaluations="2 steps - 1 (2 steps with final='sigma_min')")
@dataclass(frozen=True, kw_only=True)
class FlowHeun(Sampler):
    """Heun's method along the velocity: the trapezoidal rule in t rather than in sigma / alpha.

    Two evaluations a step, one in a step to sigma = 0. It begins at a start without signal too.
    """

    name: ClassVar[str] = "flow_heun"
    order: ClassVar[int] = 2
    default_steps: ClassVar[int] = 10

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            slope = velocity(x, run.denoise(x, now), now)
            if then.sigma > 0:
                euler = along(x, slope, now, then)
                slope = (slope + velocity(euler, run.denoise(euler, then), then)) / 2
            x = run.step(along(x, slope, now, then))
        return x

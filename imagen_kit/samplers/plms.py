"""PLMS: pseudo linear multistep (PNDM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import combine
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.linear_multistep import EQUAL_STEPS
from imagen_kit.samplers.tableau import Form


def transfer(x: Form, e: Form, now: Point, then: Point) -> Form:
    """phi(x, e, t, t'), the DDIM step with the noise ``e`` (Liu et al. 2022, eq. 11)."""
    return then.alpha / now.alpha * x + (then.sigma - then.alpha * now.ratio) * e


@register(
    "plms", order="4 on even grids, from 2 at the start", stochastic=False, evaluations="steps + 1 or + 9"
)
@dataclass(frozen=True, kw_only=True)
class Plms(Sampler):
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, Algorithms 1-2).

    The linear multistep weights of fourth order for equal steps, and a step that is exact where the noise does
    not change.

    It needs alpha > 0 at the start.

    Args:
        skip_prk_steps: start with one step of Heun's method and rising orders (as Stable Diffusion does), one
            evaluation more than steps. False: with three pseudo Runge-Kutta steps of four evaluations, whose
            stages lie half-way in time, and so with nine more.
    """

    name: ClassVar[str] = "plms"
    order: ClassVar[int] = 2

    spacing: str = "leading"
    skip_prk_steps: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.skip_prk_steps, bool):
            raise KitError(
                f"sampler 'plms': option 'skip_prk_steps' must be true or false, not {self.skip_prk_steps!r}"
            )

    def solve(self, x: Form, run: Run) -> Form:
        noises: list[Form] = []  # of the grid times, newest first
        # A run of a single step has nothing to start up for.
        starting = 0 if len(run.points) == 2 else 1 if self.skip_prk_steps else 3
        for i, now, then in run.steps:
            e = noise_in(x, run.denoise(x, now), now)
            noises = [e, *noises][:4]
            if i >= starting or then.sigma == 0:
                mean = combine(EQUAL_STEPS[len(noises)], noises)
            elif self.skip_prk_steps:
                mean = self.heun(x, e, now, then, run)
            else:
                mean = self.prk(x, e, now, then, run)
            x = run.step(transfer(x, mean, now, then))
        return x

    def heun(self, x: Form, e: Form, now: Point, then: Point, run: Run) -> Form:
        """The mean noise of a step by Heun's method (eq. 22 there)."""
        end = transfer(x, e, now, then)
        return (e + noise_in(end, run.denoise(end, then), then)) / 2

    def prk(self, x: Form, e1: Form, now: Point, then: Point, run: Run) -> Form:
        """The mean noise of a step by the pseudo Runge-Kutta method (eq. 13)."""
        t = (now.t + then.t) / 2
        middle = Point(t, *run.schedule.alpha_sigma(t))

        def noise_at(e: Form, at: Point) -> Form:
            there = transfer(x, e, now, at)
            return noise_in(there, run.denoise(there, at), at)

        e2 = noise_at(e1, middle)
        e3 = noise_at(e2, middle)
        e4 = noise_at(e3, then)
        return (e1 + 2 * e2 + 2 * e3 + e4) / 6

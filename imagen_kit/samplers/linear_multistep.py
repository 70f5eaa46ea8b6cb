"""Adams-Bashforth methods in r = sigma / alpha: LMS and iPNDM.

d(x/alpha)/dr is the noise e, so a step is x'/alpha' = x/alpha + Σ w_i e_i over the newest few answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run
from imagen_kit.samplers.dpm_multistep import Multistep
from imagen_kit.samplers.exponential import Evaluation, combine, lagrange
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form
from imagen_kit.schedules.base import Schedule

#: Adams-Bashforth weights over equal steps, newest answer first, by order.
EQUAL_STEPS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def integrals(places: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights of the polynomial through values at ``places``, given the integrals of 1, r, r², ..."""
    return [sum(c * m for c, m in zip(basis, moments, strict=True)) for basis in lagrange(places)]


def polynomial_weights(points: Sequence[Point], then: Point) -> list[float]:
    """∫ of each answer's Lagrange polynomial in r, from the first of ``points`` to ``then``, exactly."""
    now = points[0].ratio
    h = then.ratio - now
    places = [(point.ratio - now) / h for point in points]
    return [h * weight for weight in integrals(places, [1 / (k + 1) for k in range(len(places))])]


@dataclass(frozen=True, kw_only=True)
class AdamsBashforth(Multistep):
    """x'/alpha' = x/alpha + Σ w_i e_i. It needs alpha > 0 at the start.

    Args:
        order: 1 to 4, how many answers a step uses; the first steps use as many as there are.
    """

    order: int = 4  # type: ignore[misc]
    lower_order_final: bool = False

    expands_noise: ClassVar[bool] = True
    reaches_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._level("order", 1, 4)
        super().__post_init__()

    def weights(self, points: Sequence[Point], then: Point, schedule: Schedule) -> list[float]:
        """w_i for answers at ``points``, newest first; their sum is r' - r."""
        raise NotImplementedError

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        weights = self.weights([point for point, _ in answers], then, run.schedule)
        return then.alpha * (x / now.alpha + combine(weights, [answer for _, answer in answers]))


@register("lms", order="1 to 4", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Lms(AdamsBashforth):
    """Linear multistep on the probability-flow ODE (Katherine Crowson's LMS).

    The polynomial in sigma / alpha through the last noises is integrated exactly.
    """

    name: ClassVar[str] = "lms"

    def weights(self, points: Sequence[Point], then: Point, schedule: Schedule) -> list[float]:
        return polynomial_weights(points, then)


@register("ipndm", order="1 to 4 (with variable_step)", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Ipndm(AdamsBashforth):
    """Improved pseudo numerical method: PNDM without its warm-up (Zhang & Chen 2023, section 3.2).

    Args:
        variable_step: weights for the steps the grid really has (ipndm_v), which are those of ``lms``. The
            fixed weights are for equal steps in sigma / alpha; on other smooth grids they are of second order.
    """

    name: ClassVar[str] = "ipndm"

    variable_step: bool = False

    reaches_zero: ClassVar[bool] = False

    def weights(self, points: Sequence[Point], then: Point, schedule: Schedule) -> list[float]:
        if self.variable_step:
            return polynomial_weights(points, then)
        return [(then.ratio - points[0].ratio) * weight for weight in EQUAL_STEPS[len(points)]]

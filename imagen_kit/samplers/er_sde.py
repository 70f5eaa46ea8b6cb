"""ER-SDE-Solver: extended reverse-time SDEs, with the amount of noise a free function of the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import numpy as np

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import Evaluation
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

#: log(phi(r) / r) by name (paper, appendix A.8 and its published code): how much noise is drawn anew.
SCALES: dict[str, Callable[[float], float]] = {
    "ode": lambda r: 0.0,
    "sde": lambda r: math.log(r),
    "er1": lambda r: math.log(10 + math.exp(-1 / r)),
    "er2": lambda r: 0.5 * math.log(r),
    "er3": lambda r: 1.5 * math.log(r),
    "er4": lambda r: _er4(min(r, ER4_TOP)),
    # log(10 + e^(r^0.3)), written so that nothing overflows
    "er5": lambda r: r**0.3 + math.log1p(10 * math.exp(-(r**0.3))),
}
#: Where r^-0.1 log10(1 + 100 r^1.5) stops rising: above, phi would ask for a negative variance.
ER4_TOP = 1022.0
#: Gauss-Legendre nodes a step: the integrands are smooth in log r, and 24 leave 1e-13 of a step of any length.
NODES = 24


@register("er_sde", order="up to 2 (3 with curvature='exact')", stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class ErSde(Sampler):
    """ER-SDE-Solver-1, 2 and 3 (Cui et al. 2023, Algorithms 1-3, eq. 15-17).

    In r = sigma / alpha and y = x / alpha, with x0^(k) the k-th derivative of x0 by r (finite differences):

        y' = phi(r')/phi(r) y + (1 - phi(r')/phi(r)) x0 + [r' - r + phi(r') ∫ dρ/phi(ρ)] x0^(1)
             + [(r' - r)²/2 + phi(r') ∫ (ρ - r)/phi(ρ) dρ] x0^(2) + sqrt(r'² - r² (phi(r')/phi(r))²) n,

    the integrals from r' to r. A step to sigma = 0 is x0.

    Args:
        points_used: answers a step uses, 1 to 3: the paper's ER-SDE-Solver-1, 2, 3.
        scale: the noise scale function phi: ``ode`` r, ``sde`` r², ``er1`` r (e^(-1/r) + 10), ``er2`` r^1.5,
            ``er3`` r^2.5, ``er4`` r^0.9 log10(1 + 100 r^1.5), ``er5`` r (e^(r^0.3) + 10) (the paper's choice).
        curvature: ``published``: the first derivative is the last difference, which holds three points to
            second order; ``exact``: the parabola's derivative, third order.
    """

    name: ClassVar[str] = "er_sde"
    stochastic: ClassVar[bool] = True

    spacing: str = "log_snr"
    points_used: int = 3
    scale: str = "er5"
    curvature: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.points_used) is not int or not 1 <= self.points_used <= 3:
            raise KitError(
                "sampler 'er_sde': option 'points_used' must be a whole number from 1 to 3, "
                f"not {self.points_used!r}"
            )
        self._choice("scale", tuple(SCALES))
        self._choice("curvature", ("published", "exact"))

    @property
    def order(self) -> int:  # type: ignore[override]
        return min(self.points_used, 3 if self.curvature == "exact" else 2)

    def solve(self, x: Form, run: Run) -> Form:
        answers: list[Evaluation] = []
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            # an answer from an end without signal is infinitely far away, and has no say in a difference
            answers = [(now, x0), *(a for a in answers if a[0].alpha > 0)][: self.points_used]
            if then.sigma == 0:
                x = run.step(then.alpha * x0)
                continue
            share = self.kept(now, then)
            update = then.sigma / now.sigma * share * x
            update = update + (then.alpha - then.sigma / now.sigma * share * now.alpha) * x0
            if now.alpha > 0:
                weights = [then.alpha * weight for weight in taylor(self.scale, now.ratio, then.ratio)]
                for weight, derivative in zip(weights, self.derivatives(answers), strict=False):
                    update = update + weight * derivative
            x = run.step(update + then.sigma * math.sqrt(1 - share * share) * run.noise())
        return x

    def kept(self, now: Point, then: Point) -> float:
        """(phi(r')/r') / (phi(r)/r): what is kept of the noise in x; the rest is drawn anew."""
        log = SCALES[self.scale]
        return math.exp(log(then.ratio) - log(now.ratio))

    def derivatives(self, answers: list[Evaluation]) -> list[Form]:
        """x0' and x0'' by r at the newest answer, as far as there are answers."""
        slopes = [(a - b) / (p.ratio - q.ratio) for (p, a), (q, b) in pairwise(answers)]
        if len(slopes) < 2:
            return slopes
        bend = 2 * (slopes[0] - slopes[1]) / (answers[0][0].ratio - answers[2][0].ratio)
        if self.curvature == "exact":
            slopes[0] = slopes[0] + (answers[0][0].ratio - answers[1][0].ratio) / 2 * bend
        return [slopes[0], bend]


def _er4(r: float) -> float:
    return math.log(math.log10(1 + 100 * r**1.5)) - 0.1 * math.log(r)


@lru_cache(maxsize=4096)
def taylor(scale: str, start: float, then: float) -> tuple[float, float]:
    """The brackets before x0^(1) and x0^(2), by quadrature in u = log ρ, where dρ/phi(ρ) = e^(-log(phi/ρ)) du.

    Args:
        scale: name of phi.
        start, then: r and r' of the step.
    """
    log = SCALES[scale]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = math.log(start / then) / 2
    levels = [then * math.exp(half * (1 + node)) for node in nodes]
    # phi(r') dρ/phi(ρ) = r' e^(log phi(r')/r' - log phi(ρ)/ρ) du
    parts = [
        half * weight * then * math.exp(log(then) - log(level))
        for weight, level in zip(weights, levels, strict=True)
    ]
    first = then - start + sum(parts)
    second = (then - start) ** 2 / 2 + sum(
        part * (level - start) for part, level in zip(parts, levels, strict=True)
    )
    return first, second

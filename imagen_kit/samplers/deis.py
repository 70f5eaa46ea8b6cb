"""DEIS: Adams-Bashforth methods whose polynomials live in t, in sigma / alpha or in its logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from imagen_kit.samplers import register
from imagen_kit.samplers.exponential import psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.linear_multistep import AdamsBashforth, integrals, polynomial_weights
from imagen_kit.schedules.base import Schedule

VARIABLES = ("t", "rho", "log_rho")


@register("deis", order="1 to 4", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Deis(AdamsBashforth):
    """Diffusion exponential integrator sampler (Zhang & Chen 2023, section 3.2 and Appendix B).

    The noise is extrapolated by the polynomial through the last answers, and integrated exactly over
    rho = sigma / alpha.

    Args:
        order: 1 to 4, how many answers a step uses (the paper's r + 1).
        variable: what the polynomial is in. ``t``: the schedule's time (tAB-DEIS, the paper's best); ``rho``:
            sigma / alpha (rhoAB-DEIS, the same as ``lms``); ``log_rho``: its logarithm, as in diffusers.
    """

    name: ClassVar[str] = "deis"

    order: int = 3  # type: ignore[misc]
    variable: str = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("variable", VARIABLES)

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.variable != "log_rho"  # a polynomial in log rho has no limit there

    def weights(self, points: Sequence[Point], then: Point, schedule: Schedule) -> list[float]:
        if self.variable == "rho":
            return polynomial_weights(points, then)
        if self.variable == "log_rho":
            return log_rho_weights(points, then)
        return time_weights(points, then, schedule)


def log_rho_weights(points: Sequence[Point], then: Point) -> list[float]:
    """∫ of each answer's Lagrange polynomial in log rho, over rho, in closed form."""
    now = points[0]
    if len(points) == 1:
        return [then.ratio - now.ratio]
    h = then.lam - now.lam
    places = [(point.lam - now.lam) / h for point in points]
    # ∫ s^k d rho with s from 0 at `now` to 1 at `then` along lambda.
    moments = [then.ratio * math.factorial(k) * psi(k + 1, -h) for k in range(len(places))]
    return integrals(places, moments)


def time_weights(points: Sequence[Point], then: Point, schedule: Schedule) -> list[float]:
    """∫ of each answer's Lagrange polynomial in t, over rho.

    ∫ s^k d rho = rho' - k ∫ s^(k-1) rho ds, s running from 0 at the start to 1 at the end: by parts, so that
    the jump of rho to 0 at the clean end of a discrete schedule is counted.
    """
    now = points[0]
    span = then.t - now.t
    if span == 0:  # all of the step is that jump, at the newest answer's own time
        return [then.ratio - now.ratio, *[0.0] * (len(points) - 1)]
    places = [(point.t - now.t) / span for point in points]
    moments = [then.ratio - now.ratio]
    if len(places) > 1:
        s, weights = quadrature(schedule, now.t, then.t)
        alpha, sigma = schedule.alpha_sigma(torch.from_numpy(now.t + s * span))
        rho = (sigma / alpha).numpy()
        moments += [
            then.ratio - k * float((weights * s ** (k - 1) * rho).sum()) for k in range(1, len(places))
        ]
    return integrals(places, moments)


def quadrature(schedule: Schedule, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1] that integrate smooth functions of t from ``start`` to ``end`` to rounding.

    A discrete schedule is smooth between whole times only, so it is taken piece by piece.
    """
    cuts = np.array([0.0, 1.0])
    if schedule.discrete:
        whole = np.arange(math.floor(min(start, end)) + 1, math.ceil(max(start, end)))
        cuts = np.sort(np.concatenate([cuts, (whole - start) / (end - start)]))
    nodes, weights = gauss_legendre(6 if schedule.discrete else 100)
    low, width = cuts[:-1, None], np.diff(cuts)[:, None]
    return (low + width * nodes).ravel(), (width * weights).ravel()


@cache
def gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2

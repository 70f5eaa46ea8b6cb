"""Exponential integrators in lambda = log(alpha / sigma): what the DPM-Solver family is made of.

With data prediction the probability-flow ODE's exact solution over h = lambda' - lambda is (Lu et al. 2022b,
Proposition 4.1)

    x' = sigma'/sigma x + alpha' ∫ e^(lambda - lambda') x0(lambda) dlambda.

With x0 expanded in derivatives D_k = h^(k-1) x0^(k-1) the integral is Σ psi_k(h) D_k, psi_k(h) = h phi_k(-h).
Noise prediction has x' = alpha'/alpha x + sigma' Σ psi_k(-h) D_k (Lu et al. 2022a, Proposition 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

#: An evaluation the update may use: where it was made and what came out (x0, or the noise).
Evaluation = tuple[Point, Form]

KINDS = ("midpoint", "heun")


def psi(k: int, h: float) -> float:
    """h phi_k(-h), with phi_1(z) = (e^z - 1)/z and phi_(k+1)(z) = (phi_k(z) - 1/k!)/z; k = 1, 2, 3.

    h may be inf (to or from an end without noise or without signal): 1, 1, 1/2.
    """
    if abs(h) < 0.5:  # the closed form loses digits to cancellation; 16 terms reach 1e-17
        return h * sum((-h) ** j / math.factorial(j + k) for j in range(16))
    value = -math.expm1(-h)
    for j in range(1, k):
        value = 1 / math.factorial(j) - value / h
    return value


def expansion(answers: Sequence[Evaluation], h: float, kind: str) -> list[tuple[int, Form]]:
    """[(k, D)] such that a step of length ``h`` is Σ psi_k D, from one, two or three answers.

    The first answer is at the start of the step; the others lie before it (multistep) or after it
    (single-step). Two answers give psi_2 D_1 (``heun``) or psi_1 D_1 / 2 (``midpoint``), which agree to the
    order of the method; three give the parabola through them.
    """
    (at, first), *others = answers
    # Where each answer lies, in steps. A step from an end without signal is infinitely long, and its stages
    # are as far away as its end.
    spans = [point.lam - at.lam for point, _ in others]
    places = [1.0 if math.isinf(h) and math.isinf(span) else span / h for span in spans]
    slopes = [(answer - first) / place for (_, answer), place in zip(others, places, strict=True)]
    if not others:
        return [(1, first)]
    if len(others) == 1:
        return [(1, first + slopes[0] / 2)] if kind == "midpoint" else [(1, first), (2, slopes[0])]
    bend = (slopes[1] - slopes[0]) / (places[1] - places[0])
    return [(1, first), (2, slopes[0] - places[0] * bend), (3, 2 * bend)]


def data_step(x: Form, terms: Sequence[tuple[int, Form]], start: Point, then: Point) -> Form:
    """sigma'/sigma x + alpha' Σ psi_k(h) D: x0 is what is expanded (DPM-Solver++)."""
    h = then.lam - start.lam
    total = then.sigma / start.sigma * x
    for k, derivative in terms:
        total = total + then.alpha * psi(k, h) * derivative
    return total


def noise_step(x: Form, terms: Sequence[tuple[int, Form]], start: Point, then: Point) -> Form:
    """alpha'/alpha x + sigma' Σ psi_k(-h) D: the noise is what is expanded (DPM-Solver)."""
    h = then.lam - start.lam
    total = then.alpha / start.alpha * x
    for k, derivative in terms:
        total = total + then.sigma * psi(k, -h) * derivative
    return total

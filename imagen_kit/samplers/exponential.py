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
    """h phi_k(-h), with phi_1(z) = (e^z - 1)/z and phi_(k+1)(z) = (phi_k(z) - 1/k!)/z; k = 1, 2, ...

    h may be inf (to or from an end without noise or without signal): 1, 1, 1/2, 1/6, ...
    """
    if abs(h) < 1:  # the closed form loses digits to cancellation; 20 terms reach 1e-18
        return h * sum((-h) ** j / math.factorial(j + k) for j in range(20))
    value = -math.expm1(-h)
    for j in range(1, k):
        value = 1 / math.factorial(j) - value / h
    return value


def lagrange(places: Sequence[float]) -> list[list[float]]:
    """Coefficients (of 1, r, r², ...) of the polynomials that are 1 at one of the places, 0 at the others."""
    basis = []
    for i, here in enumerate(places):
        polynomial = [1.0]
        for there in (place for j, place in enumerate(places) if j != i):
            raised, kept = [0.0, *polynomial], [*polynomial, 0.0]
            polynomial = [(up - there * same) / (here - there) for up, same in zip(raised, kept, strict=True)]
        basis.append(polynomial)
    return basis


def expansion(answers: Sequence[Evaluation], h: float, kind: str = "heun") -> list[tuple[int, Form]]:
    """[(k, D)] such that a step of length ``h`` is Σ psi_k D, from one or more answers.

    The first answer is at the start of the step; the others lie before it (multistep) or after it
    (single-step). The terms are h^(k-1) times the derivatives of the polynomial through the answers: psi_2
    D_1 from two (``heun``), for which ``midpoint`` takes psi_1 D_1 / 2, the same to the order of the method.
    """
    (at, first), *others = answers
    # Where each answer lies, in steps. A step from an end without signal is infinitely long, and its stages
    # are as far away as its end; an answer infinitely long ago has no say in the polynomial.
    spans = [point.lam - at.lam for point, _ in others]
    places = [1.0 if math.isinf(h) and math.isinf(span) else span / h for span in spans]
    near = [
        (place, answer) for place, (_, answer) in zip(places, others, strict=True) if math.isfinite(place)
    ]
    if len(near) == 1 and kind == "midpoint":
        ((place, answer),) = near
        return [(1, first + (answer - first) / place / 2)]
    basis = lagrange([0.0, *(place for place, _ in near)])
    terms = [(1, first)]
    for k in range(1, len(basis)):
        slopes = [math.factorial(k) * polynomial[k] for polynomial in basis]
        terms.append((k + 1, combine(slopes, [first, *(answer for _, answer in near)])))
    return terms


def combine(weights: Sequence[float], answers: Sequence[Form]) -> Form:
    """Σ weight · answer."""
    first, *rest = (w * answer for w, answer in zip(weights, answers, strict=True))
    return sum(rest, first)


def data_step(
    x: Form,
    terms: Sequence[tuple[int, Form]],
    start: Point,
    then: Point,
    eta: float = 0.0,
    noise: Form | None = None,
) -> Form:
    """sigma'/sigma x + alpha' Σ psi_k(h) D: x0 is what is expanded (DPM-Solver++).

    With ``eta`` it is a step of the reverse SDE (Lu et al. 2022b, eq. 19, where eta = 1): the data terms are
    those of a step of length (1 + eta) h, e^(-eta h) of the noise is kept and the rest is drawn anew.
    """
    h = then.lam - start.lam
    decay = eta * h if eta else 0.0  # eta = 0 also where h is infinite
    total = then.sigma / start.sigma * math.exp(-decay) * x
    for k, derivative in terms:
        total = total + then.alpha * psi(k, h + decay) * derivative
    return total if noise is None else total + then.sigma * math.sqrt(-math.expm1(-2 * decay)) * noise


def noise_step(
    x: Form,
    terms: Sequence[tuple[int, Form]],
    start: Point,
    then: Point,
    eta: float = 0.0,
    noise: Form | None = None,
) -> Form:
    """alpha'/alpha x + sigma' Σ psi_k(-h) D: the noise is what is expanded (DPM-Solver).

    With ``eta`` it is a step of the reverse SDE (SDE-DPM-Solver of Lu et al. 2022b, where eta = 1): the noise terms
    count 1 + eta times and sigma'² eta (e^(2h) - 1) of variance is drawn anew. A step to sigma = 0 takes all
    the noise away.
    """
    if then.sigma == 0:
        return then.alpha / start.alpha * (x - start.sigma * terms[0][1])
    h = then.lam - start.lam
    total = then.alpha / start.alpha * x
    for k, derivative in terms:
        total = total + (1 + eta) * then.sigma * psi(k, -h) * derivative
    return total if noise is None else total + then.sigma * math.sqrt(eta * math.expm1(2 * h)) * noise

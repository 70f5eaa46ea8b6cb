"""SA-Solver: the predictor's and the corrector's integrals against quadrature, tau, and the ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

COSINE = schedules.create("cosine")
#: Uneven steps in lambda.
LAMBDAS = [-1.5, -0.9, -0.5, 0.3, 0.9, 1.1, 1.9]
TIMES = [COSINE.t_of_log_snr(2 * lam) for lam in LAMBDAS]


def polynomial(lam: float, degree: int) -> float:
    return sum((0.7 - 0.4 * k) * lam**k for k in range(degree + 1))


def integral(low: float, high: float, rate: float, degree: int) -> float:
    """∫ rate e^(rate (lambda - high)) P(lambda) dlambda by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half, middle = (high - low) / 2, (high + low) / 2
    lams = middle + half * nodes
    values = [rate * math.exp(rate * (lam - high)) * polynomial(lam, degree) for lam in lams]
    return half * float(np.dot(weights, values))


def run(degree: int, tau: Any, noises: Tensor, **options: Any) -> list[Tensor]:
    """States at the ends of the steps where x0 is a polynomial in lambda, whatever x."""

    def denoise(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, polynomial(COSINE.log_snr(t) / 2, degree))

    states = [torch.tensor([[0.3], [-0.8]], dtype=torch.float64)]
    settings = {"weights": "exact", "lower_order_final": False, "final": "sigma_min", **options}
    samplers.create("sa_solver", tau=tau, **settings).sample(
        denoise,
        states[0],
        COSINE,
        timesteps=TIMES,
        noise=iter(noises).__next__,
        callback=lambda step, x, x0: states.append(x),
    )
    return states


def solution(x: Tensor, i: int, tau: float, degree: int, noise: Tensor) -> Tensor:
    """Proposition 4.2 of the paper over step i, exactly."""
    (_, sigma), (alpha_then, sigma_then) = (COSINE.alpha_sigma(t) for t in TIMES[i : i + 2])
    h, eta = LAMBDAS[i + 1] - LAMBDAS[i], tau**2
    drift = integral(LAMBDAS[i], LAMBDAS[i + 1], 1 + eta, degree)
    fresh = sigma_then * math.sqrt(-math.expm1(-2 * eta * h))
    return math.exp(-eta * h) * sigma_then / sigma * x + alpha_then * drift + fresh * noise


NOISES = torch.randn(7, 2, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_predictor_integrates_polynomials(order: int, tau: float) -> None:
    """With as many answers as it wants, order p is exact for polynomials of degree p - 1."""
    states = run(order - 1, tau, NOISES, predictor_order=order, corrector_order=0)
    for i in range(order - 1, 6):
        expected = solution(states[i], i, tau, order - 1, NOISES[i])
        torch.testing.assert_close(states[i + 1], expected, rtol=0, atol=1e-12)  # rounding
    wrong = run(order, tau, NOISES, predictor_order=order, corrector_order=0)
    assert (wrong[6] - solution(wrong[5], 5, tau, order, NOISES[5])).abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.0, 0.6])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_corrector_integrates_polynomials(order: int, tau: float) -> None:
    """An Euler predictor, corrected at the end too: the last state is exact for degree c - 1, from the
    corrected state before it, which the next predictor started from.
    """
    states = run(order - 1, tau, NOISES, predictor_order=1, corrector_order=order, correct_last=True)
    # Correct step by step: once enough answers are known, corrected states are exact, the first is given.
    corrected = states[0]
    exact = run(order - 1, tau, NOISES, predictor_order=4, corrector_order=order, correct_last=True)
    torch.testing.assert_close(states[-1], exact[-1], rtol=0, atol=1e-12)  # no trace of the predictor
    for i in range(6):
        nodes = min(order, i + 2)
        if nodes < order:  # the first corrections have fewer answers: take theirs as they are
            corrected = replay_correction(corrected, i, tau, order - 1, nodes)
        else:
            corrected = solution(corrected, i, tau, order - 1, NOISES[i])
    torch.testing.assert_close(states[-1], corrected, rtol=0, atol=1e-12)


def replay_correction(x: Tensor, i: int, tau: float, degree: int, nodes: int) -> Tensor:
    """A correction of step i through ``nodes`` answers, by quadrature of their interpolation."""
    lams = LAMBDAS[i + 2 - nodes : i + 2]
    fit = np.polynomial.Polynomial.fit(lams, [polynomial(lam, degree) for lam in lams], nodes - 1)
    (_, sigma), (alpha_then, sigma_then) = (COSINE.alpha_sigma(t) for t in TIMES[i : i + 2])
    low, high, eta = LAMBDAS[i], LAMBDAS[i + 1], tau**2
    points, weights = np.polynomial.legendre.leggauss(40)
    at = (high + low) / 2 + (high - low) / 2 * points
    values = (1 + eta) * np.exp((1 + eta) * (at - high)) * fit(at)
    drift = (high - low) / 2 * float(np.dot(weights, values))
    fresh = sigma_then * math.sqrt(-math.expm1(-2 * eta * (high - low)))
    return math.exp(-eta * (high - low)) * sigma_then / sigma * x + alpha_then * drift + fresh * NOISES[i]


def test_tau_as_a_function_and_as_a_range() -> None:
    """Steps outside the range add no noise and draw none; a function of time says the same."""
    ratios = [math.exp(-lam) for lam in LAMBDAS]
    inside = [0.5 <= ratio <= 2.0 for ratio in ratios[:-1]]
    assert True in inside
    assert False in inside
    by_range = run(1, 0.7, NOISES, tau_low=0.5, tau_high=2.0)
    table = {t: 0.7 * within for t, within in zip(TIMES, inside, strict=False)}
    by_function = run(1, table.__getitem__, NOISES)
    torch.testing.assert_close(by_range[-1], by_function[-1], rtol=0, atol=0)
    sampler = samplers.create("sa_solver", tau=0.7, tau_low=0.5, tau_high=2.0, final="sigma_min")
    assert sampler.tableau(COSINE, timesteps=TIMES).noises == sum(inside)


def test_published_weights_are_those_of_a_slope_over_the_step() -> None:
    """(1 + tau²) h²/2 in place of the integral; the same to second order in the step."""
    wide = samplers.create("sa_solver", corrector_order=0, final="sigma_min", lower_order_final=False)
    h = [b - a for a, b in itertools.pairwise(LAMBDAS)]
    states = run(1, 1.0, NOISES, corrector_order=0, weights=wide.weights)
    exact = solution(states[1], 1, 1.0, 1, NOISES[1])
    slope, rate = polynomial(1.0, 1) - polynomial(0.0, 1), 2.0
    alpha = COSINE.alpha_sigma(TIMES[2])[0]
    integral_of_slope = (rate * h[1] - 1 + math.exp(-rate * h[1])) / rate
    change = alpha * slope * (rate * h[1] ** 2 / 2 - integral_of_slope)
    torch.testing.assert_close(states[2], exact + change, rtol=0, atol=1e-12)


def test_one_evaluation_a_step() -> None:
    for options, more in (({}, 0), ({"corrector_order": 0}, 0), ({"correct_last": True}, 1)):
        sampler = samplers.create("sa_solver", final="sigma_min", **options)
        assert sampler.tableau(COSINE, 8).nfe == 8 + more


@pytest.mark.parametrize("expands", ["data", "noise"])
def test_the_clean_end_is_the_answer(expands: str) -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: float) -> Tensor:
        seen.append(torch.tanh(x))
        return seen[-1]

    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    sampler = samplers.create("sa_solver", expands=expands, predictor_order=3, corrector_order=4)
    out = sampler.sample(denoise, x, COSINE, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, seen[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "option 'tau' must be a number from 0, not -0.1"),
        ({"tau": "1"}, "option 'tau' must be a number"),
        ({"predictor_order": 5}, "option 'predictor_order' must be a whole number from 1 to 4, not 5"),
        ({"corrector_order": True}, "option 'corrector_order' must be a whole number from 0 to 4"),
        ({"tau_low": 2.0, "tau_high": 1.0}, "option 'tau_high' must be at least tau_low"),
        ({"expands": "dta"}, "unknown expands 'dta'; did you mean 'data'"),
        ({"correct_last": True}, "option 'correct_last' needs final='sigma_min'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create("sa_solver", **options)


def test_a_tau_that_is_no_strength() -> None:
    with pytest.raises(KitError, match=r"tau\(.*\) must be a number from 0, not -1"):
        samplers.create("sa_solver", tau=lambda t: -1.0).tableau(COSINE, 4)

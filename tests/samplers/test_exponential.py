"""psi against its integral, and expansions against polynomials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imagen_kit.samplers.exponential import data_step, expansion, lagrange, noise_step, psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


def integral(k: int, h: float) -> float:
    """∫_0^h e^(u - h) (u/h)^(k-1) / (k-1)! du, which psi_k stands for, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2
    return float((weights / 2 * h * np.exp(h * (u - 1)) * u ** (k - 1)).sum() / math.factorial(k - 1))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "h", [1e-9, 1e-3, 0.2, 0.5, 0.9999, 1.0001, 6.0, -1e-3, -0.3, -0.9999, -1.0001, -4.0]
)
def test_psi(k: int, h: float) -> None:
    # The closed form loses up to two digits just above its switch at 1.
    assert psi(k, h) == pytest.approx(integral(k, h), rel=1e-13, abs=0)


def test_psi_of_infinite_steps() -> None:
    assert [psi(k, math.inf) for k in (1, 2, 3, 4)] == [1.0, 1.0, 0.5, 1 / 6]


def at(lam: float) -> Point:
    """A point with the given lambda on the flow line."""
    alpha = 1 / (1 + math.exp(-lam))
    return Point(1 - alpha, alpha, 1 - alpha)


@pytest.mark.parametrize("others", [(-0.4, -1.1), (0.3, 0.8)], ids=["multistep", "singlestep"])
def test_three_answers_reproduce_a_parabola(others: tuple[float, float]) -> None:
    """The terms are h^k times the derivatives of the parabola through the answers."""
    h, start = 0.9, 0.2

    def answer(lam: float) -> Form:
        return Form({"x": 3 + 2 * lam + 5 * lam * lam})

    answers = [(at(start), answer(start)), *((at(start + d), answer(start + d)) for d in others)]
    terms = [(k, form.terms["x"]) for k, form in expansion(answers, h, "heun")]
    slope = 2 + 10 * start
    assert [k for k, _ in terms] == [1, 2, 3]
    assert [v for _, v in terms] == pytest.approx([3 + 2 * start + 5 * start**2, h * slope, h * h * 10])


def test_two_answers_by_kind() -> None:
    answers = [(at(0.0), Form({"a": 1.0})), (at(-0.5), Form({"b": 1.0}))]
    ((one, first), (two, change)) = expansion(answers, 1.0, "heun")
    assert (one, two) == (1, 2)
    assert first.terms == {"a": 1.0}
    assert change.terms == pytest.approx({"b": -2.0, "a": 2.0})
    ((one, first),) = expansion(answers, 1.0, "midpoint")
    assert first.terms == pytest.approx({"a": 2.0, "b": -1.0})


def test_four_answers_reproduce_a_cubic() -> None:
    """The k-th term is h^(k-1) times the (k-1)-th derivative, for as many answers as there are."""
    h, start = 0.7, -0.4

    def answer(lam: float) -> Form:
        return Form({"x": 1 - lam + 2 * lam**2 - 3 * lam**3})

    answers = [(at(lam), answer(lam)) for lam in (start, -0.9, -1.1, -2.5)]
    terms = [form.terms["x"] for _, form in expansion(answers, h)]
    derivatives = [
        1 - start + 2 * start**2 - 3 * start**3,
        -1 + 4 * start - 9 * start**2,
        4 - 18 * start,
        -18,
    ]
    assert terms == pytest.approx([h**k * value for k, value in enumerate(derivatives)])


def test_lagrange_polynomials() -> None:
    places = [0.0, -0.3, 2.0, 5.0]
    for i, polynomial in enumerate(lagrange(places)):
        values = [np.polynomial.polynomial.polyval(place, polynomial) for place in places]
        assert values == pytest.approx([float(i == j) for j in range(4)], abs=1e-13)  # 5^3 in rounding


def test_an_answer_infinitely_long_ago_has_no_say() -> None:
    now, before, start = at(0.5), at(-0.5), Point(1.0, 0.0, 1.0)
    a, b, c = (Form({name: 1.0}) for name in "abc")
    with_it = expansion([(now, a), (before, b), (start, c)], 1.0)
    without = expansion([(now, a), (before, b)], 1.0)
    assert [(k, form.terms) for k, form in with_it] == [(k, form.terms) for k, form in without]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_both_expansions_agree_where_the_answer_is_constant_noise(eta: float) -> None:
    """x on alpha c + sigma e with both known: data and noise steps of the ODE go along it; the SDE's keep the mean
    and, summed up, the variance sigma'² of the noise."""
    now, then = at(-0.3), at(0.6)
    c, e, n = (Form({name: 1.0}) for name in "cen")
    x = now.alpha * c + now.sigma * e
    data = data_step(x, [(1, c)], now, then, eta, n)
    assert data.terms["c"] == pytest.approx(then.alpha)
    assert math.hypot(data.terms["e"], data.terms["n"]) == pytest.approx(then.sigma)
    if eta == 0:
        assert noise_step(x, [(1, e)], now, then).terms == pytest.approx({"c": then.alpha, "e": then.sigma})


def test_a_noise_step_to_the_clean_end_takes_all_noise_away() -> None:
    now = at(-0.3)
    x = now.alpha * Form({"c": 1.0}) + now.sigma * Form({"e": 1.0})
    end = noise_step(x, [(1, Form({"e": 1.0}))], now, Point(0.0, 1.0, 0.0), 1.0, Form({"n": 1.0}))
    assert end.terms == pytest.approx({"c": 1.0, "e": 0.0}, abs=1e-15)  # one rounding of sigma

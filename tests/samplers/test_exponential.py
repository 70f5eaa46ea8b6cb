"""psi against its integral, and expansions against polynomials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imagen_kit.samplers.exponential import expansion, psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


def integral(k: int, h: float) -> float:
    """∫_0^h e^(u - h) (u/h)^(k-1) / (k-1)! du, which psi_k stands for, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2
    return float((weights / 2 * h * np.exp(h * (u - 1)) * u ** (k - 1)).sum() / math.factorial(k - 1))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.2, 0.4999, 0.5001, 1.0, 6.0, -1e-3, -0.3, -0.7, -4.0])
def test_psi(k: int, h: float) -> None:
    # The closed form loses up to two digits just above its switch at 0.5.
    assert psi(k, h) == pytest.approx(integral(k, h), rel=1e-13, abs=0)


def test_psi_of_infinite_steps() -> None:
    assert [psi(k, math.inf) for k in (1, 2, 3)] == [1.0, 1.0, 0.5]


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

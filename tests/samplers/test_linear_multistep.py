"""LMS and iPNDM: their weights, and what they are the same as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from identities import same, sample

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.linear_multistep import EQUAL_STEPS, polynomial_weights


def at(ratio: float) -> Point:
    return Point(ratio, 1.0, ratio)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(count: int) -> None:
    """On uneven points Σ w r^k is ∫ r^k for k below the number of answers: to rounding, with no quadrature."""
    points, then = [at(r) for r in (3.0, 4.5, 4.6, 9.0)[:count]], at(2.0)
    weights = polynomial_weights(points, then)
    for k in range(count):
        integral = (2.0 ** (k + 1) - 3.0 ** (k + 1)) / (k + 1)
        assert sum(w * p.ratio**k for w, p in zip(weights, points, strict=True)) == pytest.approx(
            integral, rel=1e-12
        )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_steps_have_the_adams_bashforth_weights(count: int) -> None:
    weights = polynomial_weights([at(5.0 + i) for i in range(count)], at(4.0))
    assert weights == pytest.approx([-w for w in EQUAL_STEPS[count]], rel=1e-12)


def test_order_one_is_euler() -> None:
    for name in ("lms", "ipndm"):
        assert same(sample(name, order=1), sample("euler"))
    assert not same(sample("lms", order=2), sample("euler"))


def test_ipndm_with_variable_steps_is_lms() -> None:
    """Up to the step to sigma = 0, where LMS keeps its order and iPNDM takes x0."""
    ends: dict[str, Any] = {"final": "sigma_min"}
    assert same(sample("ipndm", variable_step=True, **ends), sample("lms", **ends))
    assert not same(sample("ipndm", **ends), sample("lms", **ends))


def test_ipndm_is_lms_on_equal_steps() -> None:
    edm = schedules.create("edm")
    grid = np.linspace(10.0, 1.0, 10).tolist()
    rows = [
        samplers.create(name, final="sigma_min").tableau(edm, timesteps=grid).rows
        for name in ("ipndm", "lms")
    ]
    for one, other in zip(*rows, strict=True):
        # coefficients of 1e2 at most, through the inverse of the steps
        assert dict(one.weights) == pytest.approx(dict(other.weights), rel=1e-9, abs=1e-11)


def test_the_start_uses_what_there_is() -> None:
    """Two steps of order 4 are two steps of order 2."""
    assert same(sample("lms", steps=2, order=4), sample("lms", steps=2, order=2))


@pytest.mark.parametrize("order", [0, 5, 2.0, True, "4"])
def test_orders_that_cannot_be(order: Any) -> None:
    with pytest.raises(KitError, match=r"option 'order' must be a whole number from 1 to 4, not"):
        samplers.create("lms", order=order)

"""DPM-Solver multistep: orders, kinds, prediction spaces and their stochastic forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
from identities import same, sample

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

FULL: dict[str, Any] = {"lower_order_final": False, "final": "sigma_min"}
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "dpm_solver_2m", "dpm_solver_3m", "dpmpp_2m_sde", "dpm_solver_2m_sde")


@pytest.mark.parametrize("name", MULTISTEP)
def test_order_one_is_ddim(name: str) -> None:
    options = {"eta": 0.0} if name.endswith("sde") else {}
    assert same(sample(name, orders=[1] * 7, **options), sample("ddim"))


def test_order_one_of_the_data_sde_is_ddim_with_noise() -> None:
    assert same(sample("dpmpp_2m_sde", orders=[1] * 7), sample("ddim", eta=1.0))


@pytest.mark.parametrize(
    ("sde", "ode"), [("dpmpp_2m_sde", "dpmpp_2m"), ("dpm_solver_2m_sde", "dpm_solver_2m")]
)
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_the_sde_without_noise_is_the_ode(sde: str, ode: str, kind: str) -> None:
    assert same(sample(sde, eta=0.0, kind=kind, **FULL), sample(ode, kind=kind, **FULL))
    assert not same(sample(sde, kind=kind, **FULL), sample(ode, kind=kind, **FULL))


@pytest.mark.parametrize(("three", "two"), [("dpmpp_3m", "dpmpp_2m"), ("dpm_solver_3m", "dpm_solver_2m")])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_third_order_steps_of_two_answers_are_second_order_ones(three: str, two: str, kind: str) -> None:
    assert same(sample(three, steps=2, kind=kind, **FULL), sample(two, steps=2, kind=kind, **FULL))
    assert same(sample(three, kind=kind, orders=[2] * 7), sample(two, kind=kind, lower_order_final=False))


def test_orders_spelled_out_are_the_rule() -> None:
    assert same(
        sample("dpmpp_3m", orders=[1, 2, 3, 3, 3, 2, 1], final="sigma_min"),
        sample("dpmpp_3m", final="sigma_min"),
    )
    # more than there are answers is as much as there are
    assert same(sample("dpmpp_3m", orders=[3] * 7, final="sigma_min"), sample("dpmpp_3m", **FULL))
    assert same(sample("dpmpp_3m", orders=(3,) * 7), sample("dpmpp_3m", lower_order_final=False))


@pytest.mark.parametrize("orders", ["1223", [0, 1], [4, 1], [1.0, 2.0], 3, [True]])
def test_orders_that_cannot_be(orders: Any) -> None:
    with pytest.raises(
        KitError, match="'orders' must be a list of whole numbers from 1 to 3, one for every step"
    ):
        samplers.create("dpmpp_3m", orders=orders)


def test_orders_of_another_run() -> None:
    with pytest.raises(KitError, match="option 'orders' has 3 entries for 7 steps"):
        samplers.create("dpmpp_3m", orders=[1, 2, 3]).tableau(schedules.create("flow"), 7)


def test_noise_prediction_takes_the_variance_of_the_exact_sde() -> None:
    """One first-order step to sigma_min of a known noise: what is drawn has sigma'² (e^(2h) - 1)."""
    edm = schedules.create("edm")
    tableau = samplers.create("dpm_solver_2m_sde", final="sigma_min").tableau(edm, timesteps=[4.0, 1.0])
    drawn = dict(tableau.rows[-1].weights)["n0"]
    assert drawn == pytest.approx(math.sqrt(4.0**2 - 1.0**2))

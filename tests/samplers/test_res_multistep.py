"""RES multistep: its weights against the paper's order conditions, and DPM-Solver++ with exact terms."""

from __future__ import annotations

from typing import Any

import pytest
from identities import same, sample

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.exponential import psi

FULL: dict[str, Any] = {"lower_order_final": False}


def test_it_is_dpm_solver_with_exact_terms() -> None:
    assert same(sample("res_multistep"), sample("dpmpp_2m", kind="heun", **FULL))
    assert not same(sample("res_multistep"), sample("dpmpp_2m", **FULL))
    three = sample("dpmpp_3m", kind="heun", curvature="exact", **FULL)
    assert same(sample("res_multistep", order=3), three)
    assert same(sample("res_multistep", order=1), sample("ddim"))


def test_weights_of_a_step() -> None:
    """b1 = phi_1 - phi_2 / c and b2 = phi_2 / c, c = (lambda_{i-1} - lambda_i) / h, in x' = ... + alpha' h Σ b x0."""
    edm = schedules.create("edm")
    grid = [8.0, 4.0, 1.0]
    sampler = samplers.create("res_multistep", final="sigma_min")
    weights = dict(sampler.tableau(edm, timesteps=grid).rows[-1].weights)
    before, now, then = sampler.points(edm, timesteps=grid)
    h = then.lam - now.lam
    c = (before.lam - now.lam) / h
    assert weights["d1"] == pytest.approx(psi(1, h) - psi(2, h) / c)
    assert weights["d0"] == pytest.approx(psi(2, h) / c)


def test_orders_are_checked() -> None:
    with pytest.raises(KitError, match="'order' must be a whole number from 1 to 3, not 4"):
        samplers.create("res_multistep", order=4)

"""DEIS: its weights against integrals, and what its members are the same as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from identities import same, sample
from scipy.integrate import trapezoid

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.deis import time_weights
from imagen_kit.samplers.grid import Point, clean
from imagen_kit.schedules.base import Schedule

SIGMA_MIN: dict[str, Any] = {"final": "sigma_min"}


def test_order_one_is_ddim() -> None:
    for variable in ("t", "rho", "log_rho"):
        assert same(sample("deis", order=1, variable=variable), sample("ddim"))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_rho_is_lms(order: int) -> None:
    assert same(sample("deis", order=order, variable="rho"), sample("lms", order=order))


def test_log_rho_is_dpm_solver_with_exact_terms() -> None:
    """The polynomial through the last noises in lambda, integrated: DPM-Solver's own expansion."""
    options = {**SIGMA_MIN, "lower_order_final": False}
    two = sample("dpm_solver_2m", kind="heun", **options)
    three = sample("dpm_solver_3m", kind="heun", curvature="exact", **options)
    assert same(sample("deis", order=2, variable="log_rho", **options), two)
    assert same(sample("deis", order=3, variable="log_rho", **options), three)


def test_on_a_variance_exploding_schedule_time_is_rho() -> None:
    assert same(sample("deis", "edm", variable="t"), sample("deis", "edm", variable="rho"))
    assert not same(sample("deis", "flow", variable="t"), sample("deis", "flow", variable="rho"))


def at(schedule: Schedule, t: float) -> Point:
    return Point(t, *schedule.alpha_sigma(t))


@pytest.mark.parametrize(
    ("name", "times"), [("flow", (0.6, 0.7, 0.9, 0.35)), ("scaled_linear", (600.0, 710.5, 900.0, 350.0))]
)
def test_weights_in_time(name: str, times: tuple[float, ...]) -> None:
    """Σ w t^k = ∫ t^k d rho, against a fine trapezoidal sum over rho."""
    schedule = schedules.create(name)
    *before, then = (at(schedule, t) for t in times)
    weights = time_weights(before, then, schedule)
    t = np.linspace(before[0].t, then.t, 200_001)
    alpha, sigma = schedule.alpha_sigma(torch.from_numpy(t))
    rho = (sigma / alpha).numpy()
    for k in range(3):
        integral = trapezoid((t / times[0]) ** k, rho)
        total = sum(w * (p.t / times[0]) ** k for w, p in zip(weights, before, strict=True))
        assert total == pytest.approx(integral, rel=1e-9)  # of the trapezoidal sum


def test_the_jump_to_the_clean_end_counts() -> None:
    """A discrete schedule ends at t = 0 with sigma > 0 and at sigma = 0: a step between has the whole of it."""
    schedule = schedules.create("linear")
    first, last, end = at(schedule, 50.0), at(schedule, 0.0), clean(schedule)
    assert time_weights([last, first], end, schedule) == [-last.ratio, 0.0]
    through = time_weights([first, at(schedule, 120.0)], end, schedule)
    assert sum(through) == pytest.approx(-first.ratio)
    up_to = time_weights([first, at(schedule, 120.0)], last, schedule)
    slope = -50.0 / 70.0  # the polynomial of the older answer at t = 0
    assert through[1] - up_to[1] == pytest.approx(-last.ratio * slope)


def test_variables_are_checked() -> None:
    with pytest.raises(KitError, match="sampler 'deis': unknown variable 'log_roh'; did you mean 'log_rho'"):
        samplers.create("deis", variable="log_roh")

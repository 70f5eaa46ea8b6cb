"""EDM's sampler against Algorithm 2 written out, and where it churns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

SIGMAS = [60.0, 20.0, 3.0, 0.4, 0.03]


def curved(x: Tensor, t: float) -> Tensor:
    return torch.sin(x + t) / (1 + t)


def algorithm_2(x: Tensor, noises: list[Tensor], solver: str, **churn: float) -> Tensor:
    """Karras et al. 2022, Algorithm 2, on SIGMAS and then 0, with its first line's names."""
    draws, times = iter(noises), [*SIGMAS, 0.0]
    n = len(SIGMAS)
    for now, then in itertools.pairwise(times):
        inside = churn["s_tmin"] <= now <= churn["s_tmax"]
        gamma = min(churn["s_churn"] / n, math.sqrt(2) - 1) if inside else 0.0
        raised = now + gamma * now
        if gamma > 0:
            x = x + math.sqrt(raised**2 - now**2) * churn["s_noise"] * next(draws)
        slope = (x - curved(x, raised)) / raised
        ahead = x + (then - raised) * slope
        if then != 0 and solver == "heun":
            again = (ahead - curved(ahead, then)) / then
            ahead = x + (then - raised) * (slope + again) / 2
        x = ahead
    return x


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("s_churn", [0.0, 1.0, 40.0])
def test_algorithm_2(solver: str, s_churn: float) -> None:
    schedule = schedules.create("edm")
    noises = list(torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    x = 60 * noises[5]
    options = {"s_churn": s_churn, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    sampler = samplers.create("edm", solver=solver, **options)
    got = sampler.sample(curved, x, schedule, sigmas=SIGMAS, noise=iter(noises).__next__)
    expected = algorithm_2(x, noises, solver, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)  # rounding of x, up to 180
    tableau = sampler.tableau(schedule, sigmas=SIGMAS)
    assert tableau.noises == (3 if s_churn else 0)  # 20, 3 and 0.4 lie within
    assert tableau.nfe == (9 if solver == "heun" else 5)


def test_on_another_schedule_it_is_the_same_in_sigma_over_alpha() -> None:
    """x / alpha of a variance-preserving run is the run of the variance-exploding one."""
    preserving, exploding = schedules.create("cosine"), schedules.create("edm")
    noises = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler = samplers.create("edm")
    y = 60 * noises[5]

    def scaled(x: Tensor, t: float) -> Tensor:
        alpha, sigma = preserving.alpha_sigma(t)
        return curved(x / alpha, sigma / alpha)

    a = sampler.sample(curved, y, exploding, sigmas=SIGMAS, noise=iter(noises).__next__)
    x = y * preserving.alpha_sigma(preserving.t_of_ratio(SIGMAS[0]))[0]
    b = sampler.sample(scaled, x, preserving, sigmas=SIGMAS, noise=iter(noises).__next__)
    # The schedule's inverse keeps sigma / alpha to about 1e-12.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_no_churn_above_the_schedule_nor_without_signal() -> None:
    """A discrete schedule knows nothing above its last time, and flow has no signal at t = 1."""
    linear = schedules.create("linear")
    options = {"s_churn": 100.0, "s_tmin": 0.0, "s_tmax": math.inf, "solver": "euler"}
    sampler = samplers.create("edm", **options)
    assert sampler.tableau(linear, timesteps=[999, 500]).noises == 1
    assert sampler.tableau(linear, timesteps=[998, 500]).noises == 1
    assert sampler.tableau(linear, timesteps=[900, 500]).noises == 2
    flow = schedules.create("flow")
    assert sampler.tableau(flow, timesteps=[1.0, 0.5]).noises == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_churn": -1.0}, "option 's_churn' must be a number from 0, not -1"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, "option 's_tmax' must be at least s_tmin, not 1"),
        ({"s_tmax": "high"}, "option 's_tmax' must be at least s_tmin"),
        ({"s_noise": math.inf}, "option 's_noise' must be a number"),
        ({"solver": "huen"}, "unknown solver 'huen'; did you mean 'heun'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create("edm", **options)

"""Stochastic samplers without their noise, and with the same noise as a sampler of the same formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.denoisers.analytic import GaussianMixture

FLOW = schedules.create("flow")
MIXTURE = GaussianMixture([0.6, 0.4], [[-0.6, 0.2], [0.7, -0.3]], [[0.3, 0.5], [0.4, 0.2]])
X = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

SIBLINGS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("ddim", {"eta": 0.0}, "euler", {}),
    ("euler_ancestral", {"eta": 0.0}, "euler", {}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    ("dpmpp_2m_sde", {"eta": 0.0, "kind": "heun"}, "dpmpp_2m", {"kind": "heun"}),
    ("dpmpp_3m_sde", {"eta": 0.0, "kind": "midpoint"}, "dpmpp_3m", {}),
    ("dpm_solver_2m_sde", {"eta": 0.0}, "dpm_solver_2m", {}),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpm2_ancestral", {"eta": 0.0}, "dpm2", {}),
    ("er_sde", {"scale": "ode", "points_used": 1}, "ddim", {}),
    ("edm", {"s_churn": 0.0}, "heun", {}),
    ("edm", {"s_churn": 0.0, "solver": "euler"}, "euler", {}),
    ("restart", {"intervals": []}, "heun", {}),
    ("tcd", {"gamma": 0.0}, "ddim", {}),
    (
        "sa_solver",
        {"tau": 0.0, "corrector_order": 0, "weights": "exact", "lower_order_final": False},
        "dpmpp_2m",
        {"kind": "heun", "lower_order_final": False},
    ),
    (
        "sa_solver",
        {"tau": 0.0, "corrector_order": 0, "expands": "noise", "lower_order_final": False},
        "dpm_solver_2m",
        {"kind": "heun", "lower_order_final": False},
    ),
]


@pytest.mark.parametrize(("name", "options", "sibling", "theirs"), SIBLINGS)
def test_without_noise_it_is_the_deterministic_sibling(
    name: str, options: dict[str, Any], sibling: str, theirs: dict[str, Any]
) -> None:
    denoise = MIXTURE.denoise(FLOW)

    def no_noise() -> Tensor:
        raise AssertionError("a sampler without noise drew some")

    ends = []
    for label, chosen in ((name, options), (sibling, theirs)):
        sampler = samplers.create(label, **{"spacing": "log_snr", **chosen})
        ends.append(sampler.sample(denoise, X, FLOW, 9, noise=no_noise))
    # The same numbers in another order: rounding at weights of up to 250.
    torch.testing.assert_close(*ends, rtol=0, atol=1e-11)


def test_single_steps_are_pairs_of_grid_times() -> None:
    """DPM++ SDE without noise is DPM-Solver++(2S), whose stages are grid times of a grid twice as fine."""
    sigmas = np.geomspace(5.0, 0.1, 9).tolist()
    whole = samplers.create("dpmpp_sde", eta=0.0, final="sigma_min")
    pairs = samplers.create("dpmpp_2s", final="sigma_min")
    denoise = MIXTURE.denoise(FLOW)
    a = whole.sample(denoise, X, FLOW, sigmas=sigmas[::2])
    b = pairs.sample(denoise, X, FLOW, sigmas=sigmas)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # rounding


def test_samplers_of_one_sde_with_the_same_formula() -> None:
    """SA-Solver's predictor with exact weights is SDE-DPM-Solver++; ER-SDE-Solver-1 with phi = r² is DDPM."""
    noises = torch.randn(9, 5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    denoise = MIXTURE.denoise(FLOW)

    def run(name: str, **options: Any) -> Tensor:
        sampler = samplers.create(name, **{"spacing": "log_snr", **options})
        return sampler.sample(denoise, X, FLOW, 9, noise=iter(noises).__next__)

    full = {"lower_order_final": False}
    adams = {"corrector_order": 0, "weights": "exact", **full}
    pairs = [
        (run("sa_solver", tau=1.0, **adams), run("dpmpp_2m_sde", kind="heun", **full)),
        (run("sa_solver", tau=0.5, **adams), run("dpmpp_2m_sde", kind="heun", eta=0.25, **full)),
        (
            run("sa_solver", tau=1.0, predictor_order=3, **adams),
            run("dpmpp_3m_sde", curvature="exact", **full),
        ),
        (run("er_sde", scale="sde", points_used=1), run("ddpm")),
        (run("ddim", eta=1.0), run("euler_ancestral")),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)  # rounding at weights of up to 250

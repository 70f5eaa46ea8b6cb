"""Growth of errors on the linear test equation, against closed forms and runs on tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampler_oracles import gaussian_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.samplers.stability import growths, stability

SCHEDULE = schedules.create("scaled_linear")
FLOW = schedules.create("flow")


def test_ddim_on_a_flow_in_closed_form() -> None:
    """One step of Euler: x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x0, with x0 = c x."""
    tableau = samplers.create("euler", final="sigma_min").tableau(FLOW, timesteps=[0.8, 0.3])
    spreads = np.array([0.01, 0.5, 30.0])
    gain = 0.2 * spreads**2 / (0.04 * spreads**2 + 0.64)
    factor = 0.3 / 0.8 + (0.7 - 0.2 * 0.3 / 0.8) * gain
    spread = [np.sqrt((1 - t) ** 2 * spreads**2 + t**2) for t in (0.8, 0.3)]
    np.testing.assert_allclose(
        growths(tableau, FLOW, spreads)[1, 0], factor * spread[0] / spread[1], rtol=1e-12
    )


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc", "heun", "dpm_solver_3s", "plms", "sa_solver"])
def test_growth_is_what_a_run_shows(name: str) -> None:
    """An error put into the noisy start of a run on tensors comes out as predicted."""
    sampler = samplers.create(name)
    tableau = sampler.tableau(SCHEDULE, 9)
    growth = growths(tableau, SCHEDULE, np.array([0.37]))
    denoise, zero = gaussian_denoiser(SCHEDULE, 0.0, 0.37), torch.zeros(1, dtype=torch.float64)
    states: list[torch.Tensor] = []
    keep = lambda step, x, x0: states.append(x)  # noqa: E731
    tableau.run(denoise, torch.ones(1, dtype=torch.float64), lambda: zero, keep)
    points = [tableau.start, *(SCHEDULE.alpha_sigma(t) for t in tableau.times[1:-1]), tableau.end]
    spreads = [math.hypot(0.37 * alpha, sigma) for alpha, sigma in points]
    shown = [
        abs(state.item()) * spreads[0] / spread for state, spread in zip(states, spreads[1:], strict=True)
    ]
    np.testing.assert_allclose(growth[1:, 0, 0], shown, rtol=1e-9)
    assert not growth[0].any()  # nothing is seen before it is made
    assert not np.triu(growth[:, :, 0]).any()


def test_converged_runs_grow_as_the_exact_solution() -> None:
    for name in ("ddim", "dpmpp_2m", "heun", "unipc"):
        tableau = samplers.create(name, final="sigma_min", spacing="log_snr").tableau(SCHEDULE, 300)
        growth = growths(tableau, SCHEDULE, np.array([0.05, 0.5, 5.0]))
        # ddim, of first order, is 0.5 % off after 300 steps, the others 0.01 %
        np.testing.assert_allclose(growth[-1, 0], 1, rtol=0.006 if name == "ddim" else 2e-4)


def test_the_largest_growth_is_told() -> None:
    """Noise prediction amplifies what data prediction damps (Lu et al. 2022b, section 3.2), at few steps."""
    noise = stability(samplers.create("dpm_solver_3s").tableau(SCHEDULE, 8), SCHEDULE)
    data = stability(samplers.create("dpmpp_3s").tableau(SCHEDULE, 8), SCHEDULE)
    assert noise.growth > 10 > 1.01 > data.growth
    assert str(noise).startswith(
        f"an error grows by at most {noise.growth:.4g} on the linear test equation (made "
    )
    assert f"seen after step {noise.seen + 1}, data of standard deviation {noise.spread:.2g})" in str(noise)
    assert str(data) == "no error ever grows on the linear test equation"

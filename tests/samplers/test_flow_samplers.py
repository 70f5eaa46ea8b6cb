"""Samplers along the velocity: against their formulas on the flow line, and against Euler elsewhere."""

from __future__ import annotations

import pytest
import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

FLOW = schedules.create("flow")
X = torch.tensor([[1.0, -2.0], [0.3, 0.7]], dtype=torch.float64)


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    return (x - mixture_denoiser(FLOW)(x, t)) / t


@pytest.mark.parametrize("schedule", ["flow", "cosine", "edm", "scaled_linear"])
def test_flow_euler_is_euler(schedule: str) -> None:
    assert same(sample("flow_euler", schedule), sample("euler", schedule))


def test_a_step_of_euler_and_heun() -> None:
    """x + (t' - t) v, and with the mean of the velocities at both ends."""
    first = velocity(X, 0.8)
    euler = X - 0.5 * first
    heun = X - 0.25 * (first + velocity(euler, 0.3))
    for name, expected in (("flow_euler", euler), ("flow_heun", heun)):
        sampler = samplers.create(name, final="sigma_min")
        got = sampler.sample(mixture_denoiser(FLOW), X, FLOW, timesteps=[0.8, 0.3])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)  # states of 1


def test_heun_along_the_velocity_is_not_heun_in_the_ratio() -> None:
    assert not same(sample("flow_heun", "flow"), sample("heun", "flow"))
    assert same(sample("flow_heun", "flow", steps=1), sample("euler", "flow", steps=1))


def test_flow_heun_starts_without_signal() -> None:
    """From t = 1, where sigma / alpha is infinite."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = samplers.create("flow_heun").sample(mixture_denoiser(FLOW), x, FLOW, timesteps=[1.0, 0.7, 0.3])
    assert out.isfinite().all()
    assert out.abs().max() < 4  # the data lies within 3


def test_stochastic_sampling_puts_back_fresh_noise() -> None:
    noise = torch.full_like(X, 0.5)
    sampler = samplers.create("flow_euler", stochastic_sampling=True, final="sigma_min")
    got = sampler.sample(mixture_denoiser(FLOW), X, FLOW, timesteps=[0.8, 0.3], noise=lambda: noise)
    expected = 0.7 * mixture_denoiser(FLOW)(X, 0.8) + 0.3 * noise
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)  # states of 1


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(KitError, match=r"must be true or false, not 1\.0"):
        samplers.create("flow_euler", stochastic_sampling=1.0)

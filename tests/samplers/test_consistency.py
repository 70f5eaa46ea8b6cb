"""LCM and TCD: their formulas written out, and the times that networks are distilled on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

SD = schedules.create("scaled_linear")
NOISES = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def curved(x: Tensor, t: float) -> Tensor:
    return torch.sin(x + t)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_lcm(final: str) -> None:
    times = [999.0, 499.0, 20.0]
    sampler = samplers.create("lcm", timestep_scaling=0.01, final=final)
    got = sampler.sample(curved, NOISES[8], SD, timesteps=times, noise=iter(NOISES).__next__)
    x = NOISES[8]
    ends = [SD.alpha_sigma(t) for t in times[1:]] + ([(1.0, 0.0)] if final == "zero" else [])
    for t, (alpha, sigma), noise in zip(times, ends, NOISES, strict=False):
        s = 0.01 * t
        clean = 0.25 / (s**2 + 0.25) * x + s / math.sqrt(s**2 + 0.25) * curved(x, t)
        x = alpha * clean + sigma * noise
    torch.testing.assert_close(got, x, rtol=0, atol=1e-13)


def test_lcm_counts_training_steps_on_flow_schedules() -> None:
    flow = schedules.create("flow")
    row = samplers.create("lcm", timestep_scaling=0.01).tableau(flow, timesteps=[0.1]).rows[-1]
    weights = dict(row.weights)
    assert weights["x"] == pytest.approx(0.25 / (1.0 + 0.25))
    assert weights["d0"] == pytest.approx(1 / math.sqrt(1.25))


@pytest.mark.parametrize(("name", "gamma"), [("scaled_linear", 0.3), ("scaled_linear", 1.0), ("flow", 0.6)])
def test_tcd(name: str, gamma: float) -> None:
    schedule = schedules.create(name)
    times = [999.0, 300.0, 90.0] if name == "scaled_linear" else [0.9, 0.5, 0.1]
    sampler = samplers.create("tcd", gamma=gamma)
    got = sampler.sample(curved, NOISES[8], schedule, timesteps=times, noise=iter(NOISES).__next__)
    x = NOISES[8]
    for t, then, noise in zip(times, times[1:], NOISES, strict=False):
        below = (1 - gamma) * then
        if schedule.discrete:
            below = float(round(below))  # 0.7 · 300 = 210 and 0.7 · 90 = 63, which floats hold a hair below
        (alpha, sigma), (a, s), (alpha_then, sigma_then) = map(schedule.alpha_sigma, (t, below, then))
        x0 = curved(x, t)
        landed = a * x0 + s * (x - alpha * x0) / sigma
        x = alpha_then / a * landed + math.sqrt(sigma_then**2 - (alpha_then / a * s) ** 2) * noise
    torch.testing.assert_close(got, curved(x, times[-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_times_of_the_distillation(name: str) -> None:
    """4 of the 50 times 19, 39, ... 999, as published pipelines choose them."""
    sampler = samplers.create(name)
    assert sampler.tableau(SD, 4).times[:4] == (999, 759, 499, 259)
    assert sampler.tableau(SD).nfe == 4
    assert sampler.tableau(SD, 1).times[0] == 999
    assert samplers.create(name, final="sigma_min").tableau(SD, 4).times == (999, 759, 499, 259, 0)
    assert samplers.create(name, original_steps=100).tableau(SD, 3).times[:3] == (999, 669, 339)
    # other grids where they are asked for
    assert samplers.create(name, original_steps=None).tableau(SD, 4).times[:4] == (999, 749, 499, 249)
    assert samplers.create(name, spacing="trailing").tableau(SD, 4).times[:4] == (999, 749, 499, 249)
    assert sampler.tableau(SD, timesteps=[700, 3]).times[:2] == (700, 3)
    assert sampler.tableau(schedules.create("flow"), 60).nfe == 60


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 51, "steps must be from 1 to original_steps=50, not 51"),
        ({"original_steps": 2000}, 4, "'original_steps' must be at most the schedule's 1000 times, not 2000"),
    ],
)
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_steps_the_distillation_does_not_have(
    name: str, options: dict[str, Any], steps: int, message: str
) -> None:
    with pytest.raises(KitError, match=f"'{name}': .*{message}"):
        samplers.create(name, **options).tableau(SD, steps)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lcm", {"original_steps": 0}, "'original_steps' must be a whole number from 1 or none, not 0"),
        ("lcm", {"timestep_scaling": -1.0}, "'timestep_scaling' must be a number from 0"),
        ("tcd", {"gamma": 1.1}, "'gamma' must be a number from 0 to 1, not 1.1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create(name, **options)

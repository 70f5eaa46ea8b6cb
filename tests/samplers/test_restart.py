"""Restart sampling against its algorithm written out, and where its intervals fall."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.restart import Restart

EDM = schedules.create("edm")
SIGMAS = [20.0, 6.0, 1.1, 0.2, 0.03]


def curved(x: Tensor, t: float) -> Tensor:
    return torch.sin(x + t) / (1 + t)


def heun(x: Tensor, levels: list[float]) -> Tensor:
    for now, then in itertools.pairwise(levels):
        slope = (x - curved(x, now)) / now
        ahead = x + (then - now) * slope
        if then > 0:
            ahead = x + (then - now) * (slope + (ahead - curved(ahead, then)) / then) / 2
        x = ahead
    return x


def test_the_algorithm() -> None:
    """Two intervals, one of them twice over: down, up with noise, down again in EDM's spacing."""
    noises = list(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    x = 20 * noises[3]
    sampler = samplers.create("restart", intervals=[[3, 2, 1.0, 4.0], [2, 1, 0.25, 0.9]], s_noise=1.01)
    got = sampler.sample(curved, x, EDM, sigmas=SIGMAS, noise=iter(noises).__next__)

    def way(high: float, low: float, steps: int) -> list[float]:
        return (np.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1) ** 7).tolist()

    expected = heun(x, SIGMAS[:3])
    for noise in noises[:2]:
        expected = heun(expected + math.sqrt(4.0**2 - 1.1**2) * 1.01 * noise, way(4.0, 1.1, 3))
    expected = heun(expected, SIGMAS[2:4])
    expected = heun(expected + math.sqrt(0.9**2 - 0.2**2) * 1.01 * noises[2], way(0.9, 0.2, 2))
    expected = heun(expected, [*SIGMAS[3:], 0.0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)  # rounding of x, up to 60


def test_steps_are_those_of_the_grid() -> None:
    """Evaluations of the ways down belong to the step that ends where they start."""
    sampler = samplers.create("restart", intervals=[[3, 2, 1.0, 4.0]])
    tableau = sampler.tableau(EDM, sigmas=SIGMAS)
    assert tableau.nfe == 9 + 2 * 2 * 3
    assert tableau.noises == 2
    assert [row.step for row in tableau.rows if row.step is not None] == [0, 1, 2, 3, 4]
    states: list[Tensor] = []
    sampler.sample(curved, torch.ones(1, 2), EDM, sigmas=SIGMAS, callback=lambda i, x, x0: states.append(x))
    assert len(states) == 5


@pytest.mark.parametrize(
    ("interval", "noises"),
    [
        ([3, 1, 1.0, 4.0], 1),
        ([3, 1, 0.001, 0.1], 1),  # starts at the grid's lowest level with noise, 0.03
        ([3, 1, 0.001, 0.02], 0),  # ends below that
        ([3, 1, 5.0, 19.0], 1),
        ([3, 1, 5.0, 21.0], 0),  # ends above where sampling starts
    ],
)
def test_intervals_the_grid_has_no_room_for_are_left_out(interval: list[float], noises: int) -> None:
    sampler = samplers.create("restart", intervals=[interval])
    assert sampler.tableau(EDM, sigmas=SIGMAS).noises == noises


def test_options_are_kept_as_tuples() -> None:
    """Lists, as recipes give them, make the same sampler as tuples: equal, and usable as a key."""
    a, b = Restart(intervals=[[3, 1, 1.0, 4.0]]), Restart(intervals=((3, 1, 1.0, 4.0),))
    assert a == b
    assert hash(a) == hash(b)


@pytest.mark.parametrize(
    "intervals",
    [[[3, 1, 4.0, 1.0]], [[0, 1, 1.0, 4.0]], [[3, 1.0, 1.0, 4.0]], [[3, 1, 1.0]], 4, [[3, 1, 0, 2]]],
)
def test_bad_intervals(intervals: Any) -> None:
    with pytest.raises(KitError, match=r"'intervals' must be a list of \[steps, times, low, high\]"):
        samplers.create("restart", intervals=intervals)

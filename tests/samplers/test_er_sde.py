"""ER-SDE-Solver: its Taylor weights against closed forms, the published formula, and its noise scales."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.er_sde import ER4_TOP, SCALES, taylor

FLOW = schedules.create("flow")


def phi(scale: str, r: float) -> float:
    """The paper's functions, written out."""
    functions = {
        "ode": r,
        "sde": r**2,
        "er1": r * (math.exp(-1 / r) + 10),
        "er2": r**1.5,
        "er3": r**2.5,
        "er4": r**0.9 * math.log10(1 + 100 * r**1.5),
        "er5": r * (math.exp(r**0.3) + 10),
    }
    return functions[scale]


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_scales_are_the_papers(scale: str) -> None:
    for r in (0.003, 0.2, 1.0, 7.0, 300.0):
        assert math.exp(SCALES[scale](r)) == pytest.approx(phi(scale, r) / r, rel=1e-12)


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_no_scale_asks_for_a_negative_variance(scale: str) -> None:
    """phi(r)/r must not fall; up to any noise level, and in the limit without signal."""
    levels = [*np.geomspace(1e-4, 1e6, 400), math.inf]
    values = [SCALES[scale](float(level)) for level in levels]
    assert all(b >= a - 1e-15 for a, b in itertools.pairwise(values))
    assert not any(map(math.isnan, values))


def test_where_er4_is_cut() -> None:
    """The cut lies at the top of r^-0.1 log10(1 + 100 r^1.5), to a thousandth."""
    levels = np.geomspace(ER4_TOP / 1.01, ER4_TOP * 1.01, 2001)
    top = levels[np.argmax(levels**-0.1 * np.log10(1 + 100 * levels**1.5))]
    assert top == pytest.approx(ER4_TOP, rel=1e-3)


@pytest.mark.parametrize(("start", "then"), [(9.0, 4.0), (0.5, 0.4999), (250.0, 0.02)])
def test_taylor_weights_in_closed_form(start: float, then: float) -> None:
    h, log = then - start, math.log(start / then)
    ode = (h + then * log, h**2 / 2 + then * (-h - start * log))
    sde = (h + then**2 * (1 / then - 1 / start), h**2 / 2 + then**2 * (log - start * (1 / then - 1 / start)))
    # Quadrature of smooth functions; what is left is rounding of the terms that cancel.
    assert taylor("ode", start, then) == pytest.approx(ode, rel=1e-10, abs=1e-12 * start**2)
    assert taylor("sde", start, then) == pytest.approx(sde, rel=1e-10, abs=1e-12 * start**2)


@pytest.mark.parametrize("scale", ["er5", "er2"])
def test_three_steps_by_the_published_formula(scale: str) -> None:
    """Algorithm 3 in sigma, its integrals by brute force, on flow: y = x / alpha."""
    times = [0.9, 0.75, 0.5, 0.3]
    noises = list(torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]

    def denoise(x: Tensor, t: float) -> Tensor:
        return torch.sin(2 * x + t)

    sampler = samplers.create("er_sde", scale=scale, final="sigma_min")
    got = sampler.sample(denoise, x, FLOW, timesteps=times, noise=iter(noises).__next__)
    history: list[tuple[float, Tensor]] = []
    for i, noise in enumerate(noises):
        r, then = (t / (1 - t) for t in times[i : i + 2])
        history.insert(0, (r, denoise(x, times[i])))
        keep = phi(scale, then) / phi(scale, r)
        levels = np.linspace(then, r, 200_001)
        inverse = np.array([1 / phi(scale, level) for level in levels])
        y = x / (1 - times[i])
        y = keep * y + (1 - keep) * history[0][1]
        slopes = [(a[1] - b[1]) / (a[0] - b[0]) for a, b in itertools.pairwise(history)]
        if slopes:
            y = y + (then - r + phi(scale, then) * trapezoid(inverse, levels)) * slopes[0]
        if len(slopes) > 1:
            bend = (slopes[0] - slopes[1]) / ((history[0][0] - history[2][0]) / 2)
            weighed = trapezoid((levels - r) * inverse, levels)
            y = y + ((then - r) ** 2 / 2 + phi(scale, then) * weighed) * bend
        x = (1 - times[i + 1]) * (y + math.sqrt(then**2 - r**2 * keep**2) * noise)
    # The trapezoids' error: 1e-10 of the integrals.
    torch.testing.assert_close(got, x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "er6"}, "unknown scale 'er6'; did you mean 'er"),
        ({"points_used": 4}, "option 'points_used' must be a whole number from 1 to 3, not 4"),
        ({"curvature": "none"}, "unknown curvature 'none'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create("er_sde", **options)

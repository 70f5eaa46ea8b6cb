"""PLMS against Euler, Heun and Adams-Bashforth, which it is made of."""

from __future__ import annotations

import pytest
import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError


@pytest.mark.parametrize(("skip", "extra"), [(True, 1), (False, 9)])
def test_evaluations(skip: bool, extra: int) -> None:
    assert samplers.create("plms", skip_prk_steps=skip).nfe(12) == 12 + extra


def test_one_step_is_euler() -> None:
    for skip in (True, False):
        assert same(sample("plms", steps=1, skip_prk_steps=skip), sample("euler", steps=1))


def test_the_first_step_is_heuns() -> None:
    """Ending after two steps, the second of them to sigma = 0: the state between is Heun's."""
    schedule = schedules.create("cosine")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states: dict[str, torch.Tensor] = {}
    for name in ("plms", "heun"):
        samplers.create(name).sample(
            mixture_denoiser(schedule),
            x,
            schedule,
            timesteps=[0.9, 0.4],
            callback=lambda step, state, x0, name=name: states.setdefault(name, state),
        )
    torch.testing.assert_close(states["plms"], states["heun"], rtol=0, atol=1e-12)  # states of 1


def test_pseudo_runge_kutta_is_runge_kutta_where_time_is_the_ratio() -> None:
    """On a variance-exploding schedule the transfer is x + (r' - r) e, so one step is the classical RK4."""
    edm = schedules.create("edm")
    denoise = mixture_denoiser(edm)

    def slope(x: torch.Tensor, r: float) -> torch.Tensor:
        return (x - denoise(x, r)) / r

    x = torch.tensor([[1.0, -2.0], [0.3, 4.0]], dtype=torch.float64)
    grid, h = [4.0, 3.0, 2.0], -1.0
    k1 = slope(x, 4.0)
    k2 = slope(x + h / 2 * k1, 3.5)
    k3 = slope(x + h / 2 * k2, 3.5)
    k4 = slope(x + h * k3, 3.0)
    expected = x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    states: list[torch.Tensor] = []
    samplers.create("plms", skip_prk_steps=False, final="sigma_min").sample(
        denoise, x, edm, timesteps=grid, callback=lambda step, state, x0: states.append(state)
    )
    torch.testing.assert_close(states[0], expected, rtol=0, atol=1e-13)


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(KitError, match="'skip_prk_steps' must be true or false, not 'no'"):
        samplers.create("plms", skip_prk_steps="no")

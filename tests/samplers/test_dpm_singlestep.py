"""DPM-Solver single-step: groups, first orders, and the ancestral and stochastic forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

SINGLESTEP = ("dpm_solver_2s", "dpm_solver_3s", "dpmpp_2s", "dpmpp_3s")


def test_dpm_solver_1_is_ddim() -> None:
    assert same(sample("dpm_solver_1s"), sample("ddim"))


@pytest.mark.parametrize("name", SINGLESTEP)
def test_groups_of_one_are_ddim(name: str) -> None:
    assert same(sample(name, groups=[1] * 7), sample("ddim"))


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_3s"])
def test_groups_of_one_with_noise_are_ddim_with_noise(name: str) -> None:
    assert same(sample(name, groups=[1] * 7, eta=1.0), sample("ddim", eta=1.0))


def test_third_order_in_groups_of_two_is_second_order() -> None:
    for family in ("dpm_solver", "dpmpp"):
        two = sample(f"{family}_2s", steps=6, final="sigma_min")
        assert same(sample(f"{family}_3s", steps=6, groups=[2, 2, 2], final="sigma_min"), two)


def test_groups_spelled_out_are_the_rule() -> None:
    for steps, groups in ((6, [3, 2, 1]), (7, [3, 3, 1]), (8, [3, 3, 2])):
        assert same(sample("dpmpp_3s", steps=steps, groups=groups), sample("dpmpp_3s", steps=steps))
    assert same(
        sample("dpmpp_2s", steps=6, groups=[2, 2, 1, 1]), sample("dpmpp_2s", steps=6, lower_order_final=True)
    )


@pytest.mark.parametrize("groups", ["33", [0], [4], [2.0], 3])
def test_groups_that_cannot_be(groups: Any) -> None:
    with pytest.raises(KitError, match="'groups' must be a list of whole numbers from 1 to 3, whose sum is"):
        samplers.create("dpmpp_3s", groups=groups)


def test_groups_of_another_run() -> None:
    with pytest.raises(KitError, match="option 'groups' makes 5 steps, and the grid has 7"):
        samplers.create("dpmpp_3s", groups=[3, 2]).tableau(schedules.create("flow"), 7)


def test_without_noise_the_ancestral_form_is_2s_with_its_stages_on_the_grid() -> None:
    """dpmpp_2s takes its stages from the grid: half-way in lambda on an even grid of twice as many times."""
    options: dict[str, Any] = {"final": "sigma_min"}
    assert same(
        sample("dpmpp_2s_ancestral", steps=4, eta=0.0, **options), sample("dpmpp_2s", steps=8, **options)
    )
    assert not same(
        sample("dpmpp_2s_ancestral", steps=4, eta=0.3, **options), sample("dpmpp_2s", steps=8, **options)
    )


def test_an_ancestral_step_is_the_formula() -> None:
    """k-diffusion's step in sigma, written out: to sqrt(r r_down), to r_down, and noise up to r'."""
    edm = schedules.create("edm")
    denoise, noise = mixture_denoiser(edm), torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    sampler = samplers.create("dpmpp_2s_ancestral", final="sigma_min")
    got = sampler.sample(denoise, x, edm, timesteps=[4.0, 2.0], noise=lambda: noise)
    up = (2.0**2 * (4.0**2 - 2.0**2) / 4.0**2) ** 0.5
    down = (2.0**2 - up**2) ** 0.5
    middle = (4.0 * down) ** 0.5
    x2 = middle / 4.0 * x + (1 - middle / 4.0) * denoise(x, 4.0)
    expected = down / 4.0 * x + (1 - down / 4.0) * denoise(x2, middle) + up * noise
    # the stage's time goes through the logarithm and back
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)

"""DPM-2 against its formula, and its ancestral form against Euler's."""

from __future__ import annotations

import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules


def test_a_step_is_the_formula() -> None:
    """In r = sigma / alpha on a variance-exploding schedule, written out."""
    edm = schedules.create("edm")
    denoise = mixture_denoiser(edm)
    x = torch.tensor([[1.0, -2.0], [0.3, 4.0]], dtype=torch.float64)
    got = samplers.create("dpm2", final="sigma_min").sample(denoise, x, edm, timesteps=[4.0, 1.0])
    half = x + (2.0 - 4.0) * (x - denoise(x, 4.0)) / 4.0
    expected = x + (1.0 - 4.0) * (half - denoise(half, 2.0)) / 2.0
    # the stage's time goes through the logarithm and back
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_without_noise_the_ancestral_form_is_the_plain_one() -> None:
    assert same(sample("dpm2_ancestral", eta=0.0), sample("dpm2"))
    assert not same(sample("dpm2_ancestral", eta=0.5), sample("dpm2"))


def test_one_step_is_euler() -> None:
    assert same(sample("dpm2", steps=1), sample("euler", steps=1))


def test_an_ancestral_step_asks_at_the_next_level() -> None:
    """With eta = 1 the lower level is r'²/r, whose geometric mean with r is r' itself."""
    edm = schedules.create("edm")
    seen: list[float] = []

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return x * 0

    sampler = samplers.create("dpm2_ancestral", final="sigma_min")
    sampler.sample(denoise, torch.ones(1, 2), edm, timesteps=[9.0, 3.0, 1.0])
    torch.testing.assert_close(seen, [9.0, 3.0, 3.0, 1.0], rtol=1e-12, atol=0)

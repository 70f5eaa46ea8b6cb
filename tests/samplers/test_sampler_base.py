"""Options, errors and sources of noise common to all samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_oracles import gaussian_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.base import gaussian

FLOW = schedules.create("flow")
X = torch.zeros(2, 3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4"])
def test_steps_must_be_whole_and_positive(steps: Any) -> None:
    with pytest.raises(KitError, match="steps must be a whole number of at least 1, not"):
        samplers.create("ddim").tableau(FLOW, steps)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("ddim", {"spacing": "karas"}, "unknown spacing 'karas'; did you mean 'karras'"),
        ("ddim", {"final": "sigma_mn"}, "unknown final 'sigma_mn'; did you mean 'sigma_min'"),
        ("ddim", {"eta": 1.5}, "'eta' must be a number from 0 to 1, not 1.5"),
        ("ddim", {"eta": "high"}, "'eta' must be a number"),
        ("ddim", {"offset": -1}, "'offset' must be a whole number"),
        ("ddim", {"rho": 0.0}, "'rho' must be a number above 0"),
        ("ddim", {"etaa": 0.0}, "no option 'etaa'; did you mean 'eta'"),
        ("euler_ancestral", {"eta": -1}, "'eta' must be a number from 0 to 1"),
        ("dpmpp_2m", {"kind": "heum"}, "did you mean 'heun'"),
        ("dpmpp_2s", {"kind": "midpiont"}, "did you mean 'midpoint'"),
        ("dpmpp_3m", {"curvature": "exakt"}, "did you mean 'exact'"),
        ("dpmpp_2m_sde", {"eta": -0.1}, "'eta' must be a number from 0"),
        ("ddpm", {"variance": "fixed_smal"}, "'fixed_small' or 'fixed_large' or a number from 0 to 1"),
        ("ddpm", {"variance": 2.0}, "'variance' must be a number from 0 to 1"),
    ],
)
def test_bad_options_are_told_in_one_line(name: str, options: dict[str, Any], rule: str) -> None:
    with pytest.raises(KitError, match=rule) as caught:
        samplers.create(name, **options)
    assert "\n" not in str(caught.value)


def test_steps_and_an_explicit_grid_must_agree() -> None:
    sampler = samplers.create("ddim")
    assert sampler.tableau(FLOW, 2, timesteps=[0.9, 0.5]).nfe == 2
    with pytest.raises(KitError, match="the given grid has 2 steps, not 3"):
        sampler.tableau(FLOW, 3, timesteps=[0.9, 0.5])


def test_default_steps() -> None:
    assert samplers.create("dpmpp_2m").tableau(FLOW).nfe == 20
    assert samplers.create("ddpm").tableau(FLOW).nfe == 250


def test_what_a_sampler_is_given_must_make_sense() -> None:
    sampler = samplers.create("ddim", eta=1.0)
    with pytest.raises(KitError, match=r"floating-point x, not torch\.int64"):
        sampler.sample(lambda x, t: x, torch.zeros(2, dtype=torch.int64), FLOW, 2)
    with pytest.raises(KitError, match="either noise or a generator"):
        sampler.sample(lambda x, t: x, X, FLOW, 2, noise=lambda: X, generator=torch.Generator())
    with pytest.raises(KitError, match="3 generators were given for a batch of 2"):
        sampler.sample(lambda x, t: x, X, FLOW, 2, generator=[torch.Generator()] * 3)


def test_a_generator_decides_the_sample() -> None:
    sampler = samplers.create("euler_ancestral")

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampler.sample(gaussian_denoiser(FLOW, 0.0, 1.0), X, FLOW, 4, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_gaussian_noise_is_standard_and_per_sample() -> None:
    like = torch.zeros(3, 20_000, dtype=torch.bfloat16)
    draw = gaussian(like, [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)])
    first, second = draw(), draw()
    assert first.dtype == torch.float32  # drawn fine, added in float32, rounded once
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    # 20,000 draws: standard error of the mean 0.007, of the deviation 0.005
    assert first.mean(1).abs().max() < 0.03
    assert (first.std(1) - 1).abs().max() < 0.02


def test_the_callback_sees_every_step() -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    out = samplers.create("heun").sample(
        gaussian_denoiser(FLOW, 0.3, 1.0),
        torch.ones(1, 2),
        FLOW,
        4,
        callback=lambda step, x, x0: seen.append((step, x)),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], out)


def test_prior_std_is_what_sampling_starts_from() -> None:
    assert samplers.create("ddim").tableau(schedules.create("edm"), 3).prior_std == 80.0
    assert samplers.create("ddim").tableau(schedules.create("linear"), 3).prior_std == 1.0
    assert samplers.create("ddim").tableau(FLOW, 3).prior_std == pytest.approx(0.999)


def test_heun_does_not_fit_a_flow_at_one() -> None:
    with pytest.raises(
        KitError, match=r"sampler 'heun' does not fit schedule 'flow' starting at t=1 \(alpha = 0\)"
    ):
        samplers.create("heun").tableau(FLOW, timesteps=[1.0, 0.5])
    assert samplers.create("euler").tableau(FLOW, timesteps=[1.0, 0.5]).nfe == 2

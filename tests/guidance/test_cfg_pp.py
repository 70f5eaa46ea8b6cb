from __future__ import annotations

import pytest
import torch
from guided_networks import FLOW, Counter, guided, pictures

from imagen_kit import denoise_fn, guidance, samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import renoised

T = 0.4
LINEAR, COSINE = schedules.create("linear"), schedules.create("cosine")


@pytest.mark.parametrize("schedule", [FLOW, LINEAR, COSINE], ids=lambda s: s.name)
@pytest.mark.parametrize("steps", [1, 5])
def test_with_ddim_it_is_cfg_at_a_scale_that_changes_with_time(schedule, steps):
    x, cond, uncond = pictures(3)
    conds, scale = {"cond": cond, "uncond": uncond}, 0.6
    sampler = samplers.create("ddim", renoise="uncond")
    plus = denoise_fn(Counter(0.3), schedule, "v", guidance=guidance.create("cfg_pp", scale=scale), **conds)
    got = sampler.sample(plus, x, schedule, steps)
    points = sampler.points(schedule, steps)

    def cfg(x, t):
        i = [point.t for point in points].index(t)
        now, then = points[i], points[i + 1]
        # Chung et al. 2024, §3.3: both steps change by (x0c - x0u) times a number; compare the numbers
        ahead = then.alpha * now.sigma
        weight = scale * ahead / (ahead - now.alpha * then.sigma)
        return denoise_fn(Counter(0.3), schedule, "v", guidance=weight, **conds)(x, t)

    expected = samplers.create("ddim").sample(cfg, x, schedule, steps)
    # float64; scales reach 50 where the steps are short, and x0 is 1/alpha times as uncertain as x
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_its_x0_is_cfg_within_the_unit_interval():
    x, cond, uncond = pictures(3)
    conds = {"cond": cond, "uncond": uncond}
    strategy = guidance.create("cfg_pp", scale=0.3)
    assert torch.allclose(
        guided(Counter(), "v", strategy, x, T, **conds),
        guided(Counter(), "v", 0.3, x, T, **conds),
        atol=1e-13,
    )
    x0, free = denoise_fn(Counter(), FLOW, "v", guidance=strategy, **conds).parts(x, T, ("uncond",))
    assert torch.equal(x0, guided(Counter(), "v", strategy, x, T, **conds))
    assert torch.allclose(free, guided(Counter(), "v", (), x, T, cond=uncond), atol=1e-13)  # rounding


def test_scale_0_is_the_unconditional_sample():
    x, cond, uncond = pictures(3)
    sampler = samplers.create("ddim", renoise="uncond")
    strategy = guidance.create("cfg_pp", scale=0.0)
    got = sampler.sample(
        denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=strategy), x, FLOW, 4
    )
    free = samplers.create("ddim").sample(denoise_fn(Counter(), FLOW, "v", cond=uncond), x, FLOW, 4)
    assert torch.allclose(got, free, atol=1e-12)  # float64 rounding


def test_an_interval_leaves_the_usual_sampler_and_saves_evaluations():
    x, cond, uncond = pictures(3)
    sampler, net = samplers.create("ddim", renoise="uncond"), Counter()
    strategy = guidance.create("cfg_pp", scale=0.6, interval=(100.0, 200.0))  # nowhere on this grid
    denoise = denoise_fn(net, FLOW, "v", cond=cond, uncond=uncond, guidance=strategy)
    times = [0.9, 0.6, 0.3]
    got = sampler.sample(denoise, x, FLOW, timesteps=times)
    plain = samplers.create("ddim").sample(
        denoise_fn(Counter(), FLOW, "v", cond=cond), x, FLOW, timesteps=times
    )
    assert torch.allclose(got, plain, atol=1e-13)  # the same sum in three terms instead of two
    assert net.sizes == [2] * 3
    wide = guidance.create("cfg_pp", scale=0.6, interval=(0.5, 2.0))
    mixed = denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=wide)
    one = mixed.parts(x, torch.tensor([0.9, 0.5], dtype=torch.float64), ("uncond",))
    for i, t in enumerate((0.9, 0.5)):  # sample by sample
        for part, alone in zip(one, mixed.parts(x, t, ("uncond",)), strict=True):
            assert torch.allclose(part[i], alone[i], atol=1e-13)


def test_the_sampler_must_put_the_noise_back_that_way():
    x, cond, uncond = pictures(3)
    strategy = guidance.create("cfg_pp")
    denoise = denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=strategy)
    with pytest.raises(KitError, match=r"CFGPP puts the noise back from 'uncond'.*renoise='uncond'"):
        samplers.create("ddim").sample(denoise, x, FLOW, 2)
    assert renoised(samplers.create("ddim"), (strategy,)) == samplers.create("ddim", renoise="uncond")
    limited = guidance.create("interval", of=strategy, high=1.0)
    assert renoised(samplers.create("ddim"), (limited,)).renoise == "uncond"
    assert renoised(samplers.create("ddim"), ()).renoise == "guided"
    with pytest.raises(
        KitError, match=r"cfg_pp needs a sampler with the option renoise, which 'heun' has not; .*ddim"
    ):
        renoised(samplers.create("heun"), (strategy,))


@pytest.mark.parametrize("options", [{"scale": 7.5}, {"scale": -0.1}, {"interval": (2.0, 1.0)}])
def test_bad_options_are_refused(options):
    with pytest.raises(
        KitError, match=r"cfg_pp scale must be from 0 to 1|guidance interval needs low < high"
    ):
        guidance.create("cfg_pp", **options)

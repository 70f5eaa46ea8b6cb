from __future__ import annotations

import pytest
import torch
from guided_networks import FLOW, Counter, answers, guided, per_sample, pictures

from imagen_kit import denoise_fn, guidance, samplers, schedules
from imagen_kit.errors import KitError

T = 0.4


def setting():
    x, cond, uncond = pictures(3)
    return x, {"cond": cond, "uncond": uncond}


@pytest.mark.parametrize("prediction", ["flow", "v", "eps"])
def test_without_the_factor_and_zeroed_steps_it_is_cfg(prediction):
    x, conds = setting()
    plain = guidance.create("cfg_zero", scale=3.0, zero_steps=0, optimize=False)
    # float64 rounding through the flow velocity
    assert torch.allclose(
        guided(Counter(), prediction, plain, x, T, **conds),
        guided(Counter(), prediction, 3.0, x, T, **conds),
        atol=1e-12,
    )


def test_parallel_predictions_are_not_guided():
    # uncond = k·cond: the factor makes both the same, whatever k
    x, conds = setting()

    def network(x, t, cond):
        return x * cond.mean((1, 2, 3), keepdim=True)

    strategy = guidance.create("cfg_zero", scale=9.0, zero_steps=0)
    got = guided(network, "flow", strategy, x, T, **conds)
    assert torch.allclose(got, guided(network, "flow", (), x, T, cond=conds["cond"]), atol=1e-12)  # rounding


def test_the_factor_is_the_least_squares_one_of_each_sample():
    x, conds = setting()
    cond, uncond = answers(Counter(), x, T, conds["cond"], conds["uncond"])
    best = torch.stack(
        [
            torch.linalg.lstsq(u.reshape(-1, 1), c.reshape(-1, 1)).solution[0, 0]
            for c, u in zip(cond, uncond, strict=True)
        ]
    )
    velocity = 3 * cond - 2 * per_sample(best) * uncond
    strategy = guidance.create("cfg_zero", scale=3.0, zero_steps=0)
    # x0 = x - t·velocity; float64 rounding
    assert torch.allclose(guided(Counter(), "flow", strategy, x, T, **conds), x - T * velocity, atol=1e-12)


@pytest.mark.parametrize("schedule", [FLOW, schedules.create("cosine")], ids=lambda s: s.name)
def test_zeroed_steps_leave_the_state_where_it_is(schedule):
    x, conds = setting()
    states = []
    net = Counter()
    denoise = denoise_fn(net, schedule, "v", guidance=guidance.create("cfg_zero", zero_steps=2), **conds)
    sampler = samplers.create("ddim")
    sampler.sample(denoise, x, schedule, 5, callback=lambda step, x, x0: states.append(x))
    points = sampler.points(schedule, 5)
    for i in (0, 1):
        a, b = points[0], points[i + 1]
        still = x / (a.alpha + a.sigma) * (b.alpha + b.sigma)
        assert torch.allclose(states[i], still, atol=1e-12)  # float64 rounding
    assert (
        states[2] / (points[3].alpha + points[3].sigma) - x / (points[0].alpha + points[0].sigma)
    ).abs().max() > 0.01
    assert net.sizes == [2, 2, 4, 4, 4]  # a zeroed step needs no uncond


def test_zeroed_steps_with_a_grid_for_each_sample():
    x, conds = setting()
    strategy = guidance.create("cfg_zero", zero_steps=1)
    grids = torch.tensor([[0.9, 0.6, 0.3], [0.8, 0.5, 0.1]], dtype=torch.float64)
    together = samplers.create("euler").sample(
        denoise_fn(Counter(), FLOW, "flow", guidance=strategy, **conds), x, FLOW, timesteps=grids
    )
    for i in range(2):
        own = {name: cond[i : i + 1] for name, cond in conds.items()}
        denoise = denoise_fn(Counter(), FLOW, "flow", guidance=strategy, **own)
        alone = samplers.create("euler").sample(denoise, x[i : i + 1], FLOW, timesteps=grids[i].tolist())
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)  # float64 rounding


def test_scale_1_is_no_guidance_after_the_zeroed_steps():
    x, conds = setting()
    net = Counter()
    one = guided(net, "flow", guidance.create("cfg_zero", scale=1.0, zero_steps=0), x, T, **conds)
    assert torch.equal(one, guided(net, "flow", (), x, T, **conds))
    later = guided(
        net, "flow", guidance.create("cfg_zero", scale=1.0), x, T, begin={"times": [0.8, T, 0.0]}, **conds
    )
    assert torch.equal(later, one)
    assert net.sizes == [2] * 3


def test_zeroed_steps_need_the_grid():
    x, conds = setting()
    with pytest.raises(KitError, match="needs the grid of the run"):
        guided(Counter(), "flow", guidance.create("cfg_zero"), x, T, **conds)


@pytest.mark.parametrize(
    "options", [{"scale": None}, {"zero_steps": -1}, {"zero_steps": 0.5}, {"zero_steps": True}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(KitError, match=f"cfg_zero {next(iter(options))} must be"):
        guidance.create("cfg_zero", **options)

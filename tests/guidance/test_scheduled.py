from __future__ import annotations

import math

import pytest
import torch
from guided_networks import FLOW, Counter, guided, pictures

from imagen_kit import denoise_fn, guidance, samplers
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import rescaled_stack

GRID = [1.0, 0.7, 0.5, 0.2, 0.1, 0.0]


def scales(**options) -> list[float]:
    """The scale of CFG that a schedule stands for, at every time of the grid."""
    x, cond, uncond = pictures(3)
    conds = {"cond": cond, "uncond": uncond}
    run = denoise_fn(Counter(), FLOW, "x0", guidance=guidance.create("scheduled", **options), **conds).begin(
        GRID
    )
    found = []
    for t in GRID[:-1]:
        free, told = (guided(Counter(), "x0", scale, x, t, **conds) for scale in (0.0, 1.0))
        got = run(x, t)
        found.append(((got - free).flatten() @ (told - free).flatten() / (told - free).square().sum()).item())
    return found


def test_the_shapes():
    # float64 rounding; u = 0, 1/5, ... of the steps, whatever the times
    assert scales(of=7.0, shape="constant") == pytest.approx([7.0] * 5)
    assert scales(of=7.0, shape="linear") == pytest.approx([1 + 6 * u / 5 for u in range(5)])
    assert scales(of=2.0, shape="linear", other=6.0) == pytest.approx([6 - 4 * u / 5 for u in range(5)])
    wave = [1 + 6 * (1 - math.cos(math.pi * u / 5)) / 2 for u in range(5)]
    assert scales(of=7.0, shape="cosine") == pytest.approx(wave)


def test_oscillating_as_in_imagen_video():
    assert scales(of=15.0, shape="oscillating", other=1.0, hold=2) == pytest.approx([15, 15, 1, 15, 1])
    assert scales(of=15.0, shape="oscillating", other=3.0) == pytest.approx([3, 15, 3, 15, 3])


def test_where_the_scale_is_1_nothing_more_is_evaluated():
    x, cond, uncond = pictures(3)
    net = Counter()
    strategy = guidance.create("scheduled", of=15.0, shape="oscillating", hold=1)
    denoise = denoise_fn(net, FLOW, "x0", cond=cond, uncond=uncond, guidance=strategy)
    samplers.create("euler").sample(denoise, x, FLOW, 6)
    assert net.sizes == [4, 2, 4, 2, 4, 2]


def test_stages_within_a_step_see_the_scale_of_their_own_time():
    x, cond, uncond = pictures(3)
    conds = {"cond": cond, "uncond": uncond}
    strategy = guidance.create("scheduled", of=7.0, shape="linear")
    run = denoise_fn(Counter(), FLOW, "x0", guidance=strategy, **conds).begin(GRID)
    t = 0.6  # half way from 0.7 to 0.5: one and a half of five steps
    assert torch.allclose(run(x, t), guided(Counter(), "x0", 1 + 6 * 1.5 / 5, x, t, **conds), atol=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "oscillating"])
def test_a_grid_for_each_sample(shape):
    x, cond, uncond = pictures(3)
    strategy = guidance.create("scheduled", of=7.0, shape=shape, hold=1)
    grids = [[0.9, 0.6, 0.3, 0.1], [0.8, 0.5, 0.2, 0.05]]
    together = samplers.create("euler").sample(
        denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=strategy),
        x,
        FLOW,
        timesteps=torch.tensor(grids, dtype=torch.float64),
    )
    for i, grid in enumerate(grids):
        own = {"cond": cond[i : i + 1], "uncond": uncond[i : i + 1]}
        denoise = denoise_fn(Counter(), FLOW, "v", guidance=strategy, **own)
        alone = samplers.create("euler").sample(denoise, x[i : i + 1], FLOW, timesteps=grid)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-11)  # float64 rounding


@pytest.mark.parametrize(
    "inner",
    [
        {"name": "apg", "scale": 5.0, "momentum": -0.5, "norm": 4.0},
        {"name": "cfg_zero", "scale": 5.0, "zero_steps": 2},
        {"name": "perp_neg", "scale": 5.0, "negatives": ["other"]},
        {"name": "autoguidance", "scale": 5.0},
        {"name": "interval", "of": 5.0, "high": 1.0},
    ],
    ids=lambda inner: inner["name"],
)
def test_every_strategy_can_be_scheduled(inner):
    # what a strategy adds is affine in its scale: half way between two scales is the scale half way
    x, cond, uncond, other = pictures(4)
    options = {
        "cond": cond,
        "uncond": uncond,
        "others": {"null": uncond, "other": other},
        "networks": {"weak": Counter(0.5)},
    }
    between = guidance.create("scheduled", of=inner, other=2.0)
    own = guidance.create(inner["name"], **{k: v for k, v in inner.items() if k != "name"})
    run = denoise_fn(Counter(), FLOW, "v", guidance=between, **options).begin(GRID)
    reference = denoise_fn(Counter(), FLOW, "v", guidance=own, **options).begin(GRID)
    for i, t in enumerate(GRID[:-1]):
        reference.guidance = (reference.guidance[0].with_scale(2 + 3 * i / 5),)
        assert torch.allclose(run(x, t), reference(x, t), atol=1e-11)  # float64 rounding


def test_a_number_changes_the_scale_inside():
    strategy = guidance.create("scheduled", of=3.0, shape="cosine")
    assert rescaled_stack((strategy,), 5.0) == (guidance.create("scheduled", of=5.0, shape="cosine"),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": {"name": "static_threshold"}}, "StaticThreshold has no scale to change"),
        ({"of": 3.0, "shape": "sine"}, "unknown guidance scale schedule 'sine'; did you mean 'cosine'"),
        ({"of": 3.0, "other": "low"}, "the other scale of a guidance schedule must be a number"),
        ({"of": {"name": "cfg_pp"}, "other": 2.0}, "cfg_pp scale must be from 0 to 1"),
        ({"of": 3.0, "hold": -1}, "'hold' must be a whole number from 0"),
        ({"of": 3.0, "hold": 1.5}, "'hold' must be a whole number from 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(KitError, match=message):
        guidance.create("scheduled", **options)


def test_it_needs_the_grid():
    x, cond, uncond = pictures(3)
    with pytest.raises(KitError, match="needs the grid of the run"):
        guided(Counter(), "v", guidance.create("scheduled", of=3.0), x, 0.5, cond=cond, uncond=uncond)

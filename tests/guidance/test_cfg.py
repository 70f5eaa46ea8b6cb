from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import SPACES, rescaled_stack, stack
from imagen_kit.prediction import PREDICTIONS, to_eps

FLOW = schedules.create("flow")


class Counter:
    """network(x, t, cond) = x·cond; counts evaluations as samples seen."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, t, cond):
        self.sizes.append(len(x))
        return x * cond


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))


def test_every_strategy_has_a_file_of_tests_here():
    # a new strategy needs tests/guidance/test_<name>.py and its row
    known = [
        "apg",
        "autoguidance",
        "cads",
        "cfg",
        "cfg_pp",
        "cfg_zero",
        "classifier",
        "compose",
        "dynamic_threshold",
        "interval",
    ]
    known += ["pag", "perp_neg", "rescale", "scheduled", "slg", "static_threshold"]
    assert guidance.names() == known


def test_imagen_form_on_the_noise():
    x, cond, uncond = inputs()
    t, w = 0.6, 4.0
    x0 = denoise_fn(Counter(), FLOW, "eps", cond=cond, uncond=uncond, guidance=w)(x, t)
    eps = to_eps("x0", x0, x, *FLOW.alpha_sigma(t))
    # float64 rounding times the conditioning of x0 <-> eps
    assert torch.allclose(eps, w * (x * cond) + (1 - w) * (x * uncond), atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", SPACES)
def test_the_space_makes_no_difference(prediction, space):
    x, cond, uncond = inputs()
    options = {"cond": cond, "uncond": uncond}
    raw = denoise_fn(Counter(), FLOW, prediction, guidance=guidance.create("cfg", scale=5.0), **options)(
        x, 0.3
    )
    there = guidance.create("cfg", scale=5.0, space=space)
    # an affine combination with weights summing to 1 commutes with affine maps: float64 rounding remains
    assert torch.allclose(
        denoise_fn(Counter(), FLOW, prediction, guidance=there, **options)(x, 0.3), raw, atol=1e-11
    )


def test_scale_1_is_no_guidance_and_one_evaluation():
    x, cond, _ = inputs()
    net = Counter()
    plain = denoise_fn(net, FLOW, "v", cond=cond)(x, 0.5)
    one = denoise_fn(net, FLOW, "v", cond=cond, guidance=guidance.create("cfg", scale=1.0))(x, 0.5)
    assert torch.equal(plain, one)
    assert net.sizes == [2, 2]


def test_scale_0_is_the_unconditional_prediction():
    x, cond, uncond = inputs()
    zero = denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=0.0)(x, 0.5)
    assert torch.allclose(zero, denoise_fn(Counter(), FLOW, "v", cond=uncond)(x, 0.5), atol=1e-13)  # rounding


def test_two_cfgs_add_their_differences():
    x, cond, uncond = inputs()
    options = {"cond": cond, "uncond": uncond}
    net = Counter()
    two = denoise_fn(net, FLOW, "v", guidance=[2.0, 3.5], **options)(x, 0.5)
    assert net.sizes == [4]  # the branch is shared
    assert torch.allclose(two, denoise_fn(Counter(), FLOW, "v", guidance=4.5, **options)(x, 0.5), atol=1e-13)


def test_interval_skips_the_unconditional_evaluation():
    x, cond, uncond = inputs()
    net = Counter()
    limited = guidance.create("cfg", scale=3.0, interval=(0.5, 2.0))
    denoise = denoise_fn(net, FLOW, "v", cond=cond, uncond=uncond, guidance=limited)
    always = denoise_fn(Counter(), FLOW, "v", cond=cond, uncond=uncond, guidance=3.0)
    never = denoise_fn(Counter(), FLOW, "v", cond=cond)
    ratios = [0.2, 0.5, 0.51, 1.0, 2.0, 2.01]  # sigma/alpha = t/(1 - t); the lower end is left out
    for ratio in ratios:
        t = ratio / (1 + ratio)
        inside = 0.5 < FLOW.alpha_sigma(t)[1] / FLOW.alpha_sigma(t)[0] <= 2.0
        assert torch.equal(denoise(x, t), (always if inside else never)(x, t))
    assert net.sizes == [2, 2, 4, 4, 4, 2]


def test_interval_with_a_tensor_of_times_decides_for_each_sample():
    x, cond, uncond = inputs()
    limited = guidance.create("cfg", scale=3.0, interval=(0.5, 2.0))
    options = {"cond": cond, "uncond": uncond}
    times = torch.tensor([0.1, 0.5], dtype=torch.float64)
    got = denoise_fn(Counter(), FLOW, "v", guidance=limited, **options)(x, times)
    assert torch.allclose(got[:1], denoise_fn(Counter(), FLOW, "v", cond=cond)(x, times)[:1], atol=1e-14)
    assert torch.allclose(
        got[1:], denoise_fn(Counter(), FLOW, "v", guidance=3.0, **options)(x, times)[1:], atol=1e-14
    )


@pytest.mark.parametrize("scale", ["7.5", None, math.nan, math.inf, True, [3.0]])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(KitError, match="guidance scale must be a number"):
        guidance.create("cfg", scale=scale)


@pytest.mark.parametrize("interval", [0.5, (1.0,), (2.0, 1.0), ("a", "b"), "ab", (1.0, math.nan), (1, 2, 3)])
def test_a_wrong_interval_is_refused(interval):
    with pytest.raises(KitError, match="guidance interval"):
        guidance.create("cfg", interval=interval)


def test_a_wrong_space_is_refused_with_the_nearest():
    with pytest.raises(KitError, match="unknown guidance space 'x_0'; did you mean 'x0'"):
        guidance.create("cfg", space="x_0")


def test_strategies_are_immutable_and_compare_by_value():
    cfg = guidance.create("cfg", scale=2.0)
    with pytest.raises(AttributeError):
        cfg.scale = 3.0
    assert cfg.with_scale(3.0) == guidance.create("cfg", scale=3.0)
    assert cfg.scale == 2.0


def test_a_stack_from_numbers_names_and_strategies():
    cfg, clip = guidance.create("cfg", scale=2.0), guidance.create("static_threshold")
    assert stack(2) == stack(2.0) == stack(cfg) == stack([{"name": "cfg", "scale": 2.0}]) == (cfg,)
    assert stack([2.0, {"name": "static_threshold"}]) == (cfg, clip)
    assert stack(None) == stack([]) == ()
    with pytest.raises(KitError, match="unknown guidance 'cgf'; did you mean 'cfg'"):
        stack([{"name": "cgf"}])


def test_another_scale_for_a_stack():
    cfg, clip = guidance.create("cfg", scale=2.0), guidance.create("static_threshold")
    limited = guidance.create("interval", of=cfg, high=1.0)
    assert rescaled_stack((cfg, clip), 5.0) == (guidance.create("cfg", scale=5.0), clip)
    assert rescaled_stack((clip,), 5.0) == (guidance.create("cfg", scale=5.0), clip)
    assert rescaled_stack((limited,), 5.0) == (guidance.create("interval", of=5.0, high=1.0),)


def test_guiding_the_first_channels_only():
    x, cond, uncond = inputs()
    options = {"cond": cond, "uncond": uncond}
    plain = denoise_fn(Counter(), FLOW, "eps", cond=cond)(x, 0.4)
    whole = denoise_fn(Counter(), FLOW, "eps", guidance=guidance.create("cfg", scale=3.0), **options)(x, 0.4)
    two = guidance.create("cfg", scale=3.0, channels=2)
    found = denoise_fn(Counter(), FLOW, "eps", guidance=two, **options)(x, 0.4)
    assert torch.equal(found[:, :2], whole[:, :2])
    assert torch.equal(found[:, 2:], plain[:, 2:])
    assert not torch.allclose(whole[:, 2:], plain[:, 2:])
    every = guidance.create("cfg", scale=3.0, channels=3)
    assert torch.equal(denoise_fn(Counter(), FLOW, "eps", guidance=every, **options)(x, 0.4), whole)
    assert two.with_scale(5.0).channels == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("channels", [0, -1, 2.0, True, "3"])
def test_wrong_channels_are_refused(channels):
    with pytest.raises(KitError, match="cfg channels must be a whole number"):
        guidance.create("cfg", channels=channels)

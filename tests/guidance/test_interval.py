from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.errors import KitError

FLOW, LINEAR = schedules.create("flow"), schedules.create("linear", zero_terminal_snr=True)


def evaluations(strategy, schedule, t) -> int:
    sizes = []

    def network(x, t, cond):
        sizes.append(len(x))
        return x * cond

    one = torch.ones(1, 3, 2, 2)
    denoise_fn(network, schedule, "v", cond=one, uncond=2 * one, guidance=strategy)(one, t)
    return sum(sizes)


def test_it_equals_the_short_form_of_cfg():
    short = guidance.create("cfg", scale=3.0, interval=(0.3, 3.0))
    long = guidance.create("interval", of={"name": "cfg", "scale": 3.0}, low=0.3, high=3.0)
    cond, uncond, x = (torch.randn(2, 3, 4, 4) for _ in range(3))
    for t in (0.1, 0.5, 0.9):
        a, b = (
            denoise_fn(lambda x, t, c: x * c, FLOW, "v", cond=cond, uncond=uncond, guidance=g)(x, t)
            for g in (short, long)
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("by", "low", "high", "inside", "outside"),
    [
        ("t", 200.0, 600.0, [200.5, 600.0], [200.0, 601.0]),
        ("sigma", 1.0, math.inf, [999.0, 800.0], [100.0]),  # alpha is exactly 0 at t = 999
        ("log_snr", 0.0, math.inf, [0.0, 100.0], [800.0, 999.0]),
    ],
)
def test_each_axis_and_what_it_costs(by, low, high, inside, outside):
    strategy = guidance.create("interval", of=3.0, low=low, high=high, by=by)
    assert [evaluations(strategy, LINEAR, t) for t in inside] == [2] * len(inside)
    assert [evaluations(strategy, LINEAR, t) for t in outside] == [1] * len(outside)


def test_the_clean_end_is_infinite_log_snr():
    strategy = guidance.create("interval", of=3.0, low=5.0, by="log_snr")
    assert evaluations(strategy, FLOW, 0.0) == 2


def test_it_limits_strategies_without_evaluations_too():
    strategy = guidance.create("interval", of={"name": "static_threshold", "limit": 0.5}, low=1.0)
    x = torch.full((1, 3, 2, 2), 2.0)
    denoise = denoise_fn(lambda x, t: x, FLOW, "x0", guidance=strategy)
    assert denoise(x, 0.9).max() == 0.5
    assert denoise(x, 0.1).max() == 2.0


def test_scale_1_inside_costs_nothing():
    assert evaluations(guidance.create("interval", of=1.0), FLOW, 0.5) == 1


def test_bad_options_are_refused():
    with pytest.raises(KitError, match="unknown guidance interval axis 'snr'; did you mean 'log_snr'"):
        guidance.create("interval", of=3.0, by="snr")
    with pytest.raises(KitError, match="low < high"):
        guidance.create("interval", of=3.0, low=2.0, high=1.0)
    with pytest.raises(KitError, match="unknown guidance 'cfgg'; did you mean 'cfg'"):
        guidance.create("interval", of={"name": "cfgg"})
    with pytest.raises(KitError, match="needs the option 'of'"):
        guidance.create("interval", low=1.0)


def test_intervals_nest_also_sample_by_sample():
    inner = {"name": "interval", "of": {"name": "static_threshold", "limit": 0.5}, "low": 1.0}
    x, times = torch.full((3, 3, 2, 2), 2.0), [0.3, 0.6, 0.9]  # sigma/alpha of 0.4, 1.5 and 9
    denoise = denoise_fn(lambda x, t: x, FLOW, "x0", guidance=guidance.create("interval", of=inner, high=5.0))
    assert [denoise(x[:1], t).max().item() for t in times] == [2.0, 0.5, 2.0]
    assert denoise(x, torch.tensor(times)).amax((1, 2, 3)).tolist() == [2.0, 0.5, 2.0]

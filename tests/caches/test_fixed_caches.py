"""Caches whose rule is fixed before the run: interval, taylor, deep_cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cached_networks import FLOW, Known, answers, inputs, network
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import caches, denoise_fn
from imagen_kit.caches.base import Turn
from imagen_kit.caches.deep_cache import crowded
from imagen_kit.caches.taylor import lagrange
from imagen_kit.denoisers.layers.inner import counting
from imagen_kit.errors import KitError

# A float32 time is off by 6e-8, and a forecast of order 3 adds up answers with weights of up to 10.
NEAR = {"atol": 1e-5, "rtol": 0}


def numbers(found: list[torch.Tensor]) -> list[float]:
    return [float(answer[0]) for answer in found]


def computed(cache, count: int, grid: list[float] | None = None) -> list[int]:
    """Numbers of the evaluations that compute."""
    module, times = Known(lambda t, label: t), grid or np.linspace(1, 0.1, count).tolist()
    places = []
    denoise = denoise_fn(module, FLOW, "x0", cache=cache).begin([*times, 0.0])
    for i, t in enumerate(times):
        denoise(torch.zeros(1, 1, 1, 1), t)
        if len(module.rows) > len(places):
            places.append(i)
    return places


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"every": 2}, [0, 2, 4, 6, 8]),
        ({"every": 4}, [0, 4, 8]),
        ({"every": 3, "warm_up": 3}, [0, 1, 2, 5, 8]),
        ({"full_at": [1, 5]}, [0, 1, 5]),
        ({"full_at": []}, [0]),
    ],
)
def test_interval_computes_where_it_says(options, expected):
    assert computed({"name": "interval", **options}, 10) == expected


def test_between_an_interval_answers_what_was_computed_last():
    found = answers(Known(lambda t, label: t), [0.9, 0.8, 0.7, 0.6], {"name": "interval", "every": 3})
    assert numbers(found) == pytest.approx([1.9, 1.9, 1.9, 1.6], abs=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("axis", ["t", "steps"])
def test_taylor_is_exact_for_polynomials_of_its_order(order, axis):
    """In native time on an uneven grid; in steps on an even one, where the two are the same."""
    even = np.linspace(0.95, 0.05, 16)
    times = (even if axis == "steps" else even**2).tolist()
    coefficients = [0.3, -1.0, 2.0, 1.5][: order + 1]
    module = Known(lambda t, label: sum(c * t**i for i, c in enumerate(coefficients)))
    cache = {"name": "taylor", "order": order, "every": 3, "warm_up": order + 1, "axis": axis}
    exact = numbers(answers(module, times))
    module.rows.clear()
    found = numbers(answers(module, times, cache, grid=[*times, 0.0]))
    assert sum(module.rows) < 2 * len(times)
    np.testing.assert_allclose(found, exact, **NEAR)


def test_taylor_of_too_low_an_order_is_not_exact():
    times = np.linspace(0.95, 0.05, 12).tolist()
    module = Known(lambda t, label: t**3)
    exact, found = (
        numbers(answers(module, times, cache))
        for cache in (None, {"name": "taylor", "order": 1, "warm_up": 2})
    )
    assert np.abs(np.subtract(found, exact)).max() > 1e-2


@pytest.mark.parametrize("name", ["interval", "taylor", "deep_cache"])
def test_what_does_not_change_with_time_is_exact(name):
    """Order ≥ 0: the answer of the inner part may differ from sample to sample, not from time to time."""
    cond_rest = Known(
        lambda t, label: torch.arange(1.0, len(t) + 1, dtype=torch.float64), outer=lambda t, label: t
    )
    times = [0.9, 0.85, 0.4, 0.3, 0.1]
    exact = answers(cond_rest, times)
    found = answers(cond_rest, times, {"name": name, "every": 4})
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_at_a_time_that_comes_twice_the_newer_answer_counts():
    """As in Heun's second stage: a polynomial through two answers at one time there is none."""
    cache = caches.create("taylor", order=1, every=3, warm_up=3, axis="t")
    module = Known(lambda t, label: t)
    found = numbers(answers(module, [0.9, 0.7, 0.7, 0.5, 0.4, 0.3], cache))
    assert found == pytest.approx([1.9, 1.7, 1.7, 1.5, 1.4, 1.3], abs=1e-5)


@pytest.mark.parametrize("nodes", [[3.0], [0.0, 3.0], [0.0, 1.0, 4.0, 5.5]])
def test_weights_of_a_forecast_sum_to_one_and_reproduce_nodes(nodes):
    assert sum(lagrange(7.0, nodes)) == pytest.approx(1.0, abs=1e-12)
    for i, node in enumerate(nodes):
        assert lagrange(node, nodes) == pytest.approx([float(i == j) for j in range(len(nodes))], abs=1e-12)


def test_forecasts_of_half_precision_are_added_up_in_float32():
    """2·257 − 256 in bfloat16's eight bits is not 258 unless the sum is made in more."""
    memory = caches.create("taylor", order=1).memory()
    for i, value in enumerate((256.0, 258.0)):
        memory.keep(
            Turn(i, 1.0 - i), [True], torch.tensor([[value]], dtype=torch.bfloat16), torch.zeros(1, 1)
        )
    assert memory.recall(Turn(2, -1.0)).item() == 260.0
    assert memory.recall(Turn(2, -1.0)).dtype == torch.bfloat16


@pytest.mark.parametrize("center", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("steps", "every"), [(50, 3), (20, 2), (10, 5), (7, 3), (4, 8)])
def test_crowded_steps_are_as_many_as_even_ones(steps, every, center):
    chosen = sorted(crowded(steps, every, center, 1.4))
    assert len(chosen) == -(-steps // every)
    assert chosen[0] == 0
    assert chosen[-1] < steps


def test_crowded_steps_lie_most_densely_at_the_center():
    chosen = sorted(crowded(100, 5, 0.4, 2.0))
    gaps = np.diff(chosen)
    nearest = int(np.argmin([abs((a + b) / 2 - 40) for a, b in itertools.pairwise(chosen)]))
    assert gaps[nearest] == gaps.min()
    assert gaps[0] > gaps[nearest] < gaps[-1]


def test_a_power_of_one_is_the_even_schedule():
    assert crowded(50, 5, 0.37, 1.0) == frozenset(range(0, 50, 5))


def test_deep_cache_computes_at_its_steps():
    assert computed({"name": "deep_cache", "every": 4}, 10) == [0, 4, 8]
    crowd = sorted(crowded(12, 3, 0.25, 1.4))
    assert crowd != [0, 3, 6, 9]
    assert computed({"name": "deep_cache", "every": 3, "center": 0.25}, 12) == crowd


def test_a_step_of_several_evaluations_is_computed_at_its_first():
    """Times of a two-stage solver with a stage halfway: the second stage lies in the same step."""
    grid = np.linspace(1, 0, 7)
    times = [t for a, b in itertools.pairwise(grid) for t in (float(a), float((a + b) / 2))]
    module = Known(lambda t, label: t)
    denoise = denoise_fn(
        module, FLOW, "x0", cache={"name": "deep_cache", "every": 2, "center": 0.0, "power": 1.0}
    )
    run = denoise.begin(grid.tolist())
    rows = []
    for t in times:
        run(torch.zeros(1, 1, 1, 1), t)
        rows.append(len(module.rows))
    assert rows == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_a_center_needs_the_grid():
    denoise = denoise_fn(
        Known(lambda t, label: t), FLOW, "x0", cache={"name": "deep_cache", "center": 0.5}
    ).begin()
    with pytest.raises(KitError, match="center needs the grid of the run"):
        denoise(torch.zeros(1, 1, 1, 1), 0.5)


@torch.no_grad()
def test_deep_features_are_joined_with_the_present_first_skip_connection():
    """A U-Net at depth 1, its last block and head applied by hand to the deep features of the step before."""
    module, (x, cond) = network("unet"), inputs("unet")
    kept = []
    last = module.up[-1][-1]
    handle = last.register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0][:, :32]))
    run = caches.create("deep_cache", every=2).begin(module, [0.9, 0.5, 0.0])
    run(x, torch.full((3,), 0.9), cond)
    handle.remove()
    y = x + 0.1
    found = run(y, torch.full((3,), 0.5), cond)
    emb, context = module._embed(torch.full((3,), 0.5), cond)
    deep = last(torch.cat([kept[0], module.stem(y)], dim=1), emb, context, cond.mask)
    expected = module.head(torch.nn.functional.silu(module.norm_out(deep)))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_the_operations_saved_are_the_inner_blocks():
    """Of 8 evaluations 4 leave out what a network of four blocks computes more than one of one."""

    def flops(depth: int, evaluations: int, cache=None) -> int:
        module, (x, cond) = network("dit", depth=depth), inputs("dit")
        times = np.linspace(0.9, 0.1, evaluations).tolist()
        with FlopCounterMode(display=False) as counter:
            answers(module, times, cache, x, cond)
        return counter.get_total_flops()

    # differences, since what is made of the text is made once a run
    four, one = (flops(depth, 2) - flops(depth, 1) for depth in (4, 1))
    assert one < four
    assert flops(4, 8) - flops(4, 8, {"name": "interval", "every": 2}) == 4 * (four - one)
    with counting() as count:
        flops(4, 8, {"name": "interval", "every": 2})
    assert count.saved == pytest.approx(0.5 * 3 / 4)

"""What every cache promises. A new cache needs a row in ``CASES``."""

from __future__ import annotations

import pytest
import torch
from cached_networks import FLOW, NETWORKS, Known, answers, inputs, network

from imagen_kit import caches, denoise_fn, samplers
from imagen_kit.caches.base import Run, StepCache, build
from imagen_kit.denoisers.layers.inner import counting
from imagen_kit.errors import KitError

TIMES = [0.9, 0.7, 0.5, 0.35, 0.2, 0.1]
# name: options with which it changes nothing, options with which it leaves something out
CASES = {
    "interval": ({"every": 1}, {"every": 2}),
    "taylor": ({"every": 1}, {"every": 2, "order": 1}),
    "deep_cache": ({"every": 1}, {"every": 2}),
    "first_block": ({"threshold": 0.0}, {"threshold": 0.6}),
    "accumulated": ({"threshold": 0.0}, {"threshold": 0.6}),
}
HOST_READS = {"first_block", "accumulated"}


def test_every_cache_has_a_case():
    assert set(caches.names()) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_says_what_it_costs(name):
    facts = caches.describe(name)
    assert facts["waits"] == (name in HOST_READS)
    assert facts["capturable"] == caches.create(name).capturable == (name not in HOST_READS)
    assert facts["options"]["depth"] == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["dit", "unet"])
@torch.no_grad()
def test_with_nothing_left_out_it_is_the_network_bit_for_bit(name, kind):
    module, (x, cond) = network(kind), inputs(kind)
    plain = answers(module, TIMES, None, x, cond)
    with counting() as count:
        cached = answers(module, TIMES, {"name": name, **CASES[name][0]}, x, cond)
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    assert (count.asked, count.left_out, count.saved) == (len(TIMES) * len(x), 0, 0.0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(name, kind):
    """Each sample alone: the same decisions and, up to rounding, the same answers."""
    module, (x, cond) = network(kind), inputs(kind)
    cache = {"name": name, **CASES[name][1]}
    with counting() as together:
        whole = answers(module, TIMES, cache, x, cond)
    with counting() as apart:
        each = [
            answers(module, TIMES, cache, x[i : i + 1], cond[i : i + 1] if cond.batch else cond)
            for i in range(len(x))
        ]
    near = 1e-3 if kind == "edm2" else 1e-10  # the convolutions of other batches add up in another order
    for step, answer in enumerate(whole):
        torch.testing.assert_close(answer, torch.cat([run[step] for run in each]), atol=near, rtol=near)
    assert (together.asked, together.left_out) == (apart.asked, apart.left_out)
    assert together.saved == pytest.approx(apart.saved)
    assert together.left_out > 0


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_runs_that_are_interleaved_do_not_meet(name):
    module, (x, cond) = network("dit"), inputs("dit")
    denoise = denoise_fn(module, FLOW, "flow", cond=cond, cache=caches.create(name, **CASES[name][1]))
    alone = [[run(y, t) for t in TIMES] for y in (x, -x) for run in [denoise.begin(TIMES)]]
    one, other = denoise.begin(TIMES), denoise.begin(TIMES)
    pairs = [(one(x, t), other(-x, t)) for t in TIMES]
    for mine, (a, b) in zip(zip(*alone, strict=True), pairs, strict=True):
        assert torch.equal(mine[0], a)
        assert torch.equal(mine[1], b)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outside_a_run_everything_is_computed(name):
    module = Known(lambda t, label: t**2)
    denoise = denoise_fn(module, FLOW, "x0", cache={"name": name, **CASES[name][1]})
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    assert [float(denoise(x, t)[0]) for t in TIMES] == pytest.approx([1 + t**2 for t in TIMES], abs=1e-6)
    assert module.rows == [2] * len(TIMES)


@pytest.mark.parametrize("name", CASES)
def test_what_is_remembered_holds_no_gradient(name):
    module, (x, cond) = network("dit"), inputs("dit")
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    run = caches.create(name, **CASES[name][1]).begin(module, TIMES)
    for t in TIMES:
        run(x, torch.full((len(x),), t), cond)
    (memory,) = run._memories.values()
    kept = [memory.rest, memory.probe, *(rest for _, rest in getattr(memory, "known", ()))]
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_loop_of_ones_own_calls_the_run_in_place_of_the_network(name):
    module, (x, cond) = network("dit"), inputs("dit")
    cache = caches.create(name, **CASES[name][1])
    run = cache.begin(module)
    assert isinstance(run, Run)
    mine = [run(x, torch.full((len(x),), t), cond) for t in TIMES]
    # evaluations are an even grid, whatever their times: that of 6 steps is the same axis
    theirs = answers(module, TIMES, cache, x, cond, grid=TIMES)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_rising_time_is_never_answered_from_memory(name):
    """As after a restart: what is remembered of 0.1 says nothing at 0.9, by the rule or by what is seen."""
    module = Known(lambda t, label: t**2, outer=lambda t, label: t)
    times = [*TIMES[:5], 0.9, 0.5]  # an evaluation that no rule here computes by its number
    found = answers(module, times, {"name": name, **CASES[name][1]})
    assert float(found[5][0]) == pytest.approx(0.9 + 0.81, abs=1e-6)


@torch.no_grad()
def test_heun_and_a_restart_run_with_every_cache():
    module, (x, cond) = network("dit"), inputs("dit")
    for sampler in ("heun", "restart", "edm", "euler_ancestral"):
        for name, (_, options) in CASES.items():
            denoise = denoise_fn(module, FLOW, "flow", cond=cond, cache={"name": name, **options})
            end = samplers.create(sampler).sample(
                denoise, x, FLOW, 6, generator=torch.Generator().manual_seed(0)
            )
            assert torch.isfinite(end).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("interval", {"every": 0}, "cache every must be a whole number of at least 1"),
        ("interval", {"warm_up": 1.5}, "cache warm_up must be a whole number"),
        ("interval", {"full_at": [0, -1]}, "cache full_at must be a list of whole numbers"),
        ("interval", {"depth": 0}, "cache depth must be a whole number of at least 1"),
        ("taylor", {"order": -1}, "cache order must be a whole number of at least 0"),
        ("taylor", {"axis": "sigma"}, "unknown cache axis 'sigma'"),
        ("deep_cache", {"center": 1.5}, "cache center must be from 0 to 1"),
        ("deep_cache", {"power": 0.5}, "cache power must be at least 1"),
        ("first_block", {"threshold": -0.1}, "cache threshold must be at least 0"),
        ("first_block", {"max_skips": True}, "cache max_skips must be a whole number"),
        ("accumulated", {"rescale": []}, "cache rescale must be a list of coefficients"),
        ("accumulated", {"rescale": ["a"]}, "cache rescale coefficient must be a number"),
        ("first_blok", {}, "did you mean 'first_block'"),
        ("first_block", {"treshold": 0.1}, "did you mean 'threshold'"),
    ],
)
def test_mistakes_are_told_in_one_line(name, options, message):
    with pytest.raises(KitError) as caught:
        caches.create(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_from_a_name_a_mapping_or_itself():
    cache = caches.create("interval", every=3)
    assert build({"name": "interval", "every": 3}) == build(cache) == cache
    assert build("interval") == caches.create("interval")
    assert build(None) is None
    with pytest.raises(KitError, match="must be a name, a mapping with 'name' or a cache, got 3"):
        build(3)
    assert isinstance(cache, StepCache)

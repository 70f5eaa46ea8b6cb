"""Caches under guidance: branches that come and go, changed layers, several networks, compiled blocks."""

from __future__ import annotations

import pytest
import torch
from cached_networks import FLOW, Known, answers, inputs, network

from imagen_kit import caches, denoise_fn, guidance, samplers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.inner import counting
from imagen_kit.errors import KitError

TIMES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
ZERO, ONE = Cond(labels=torch.zeros(2, dtype=torch.int64)), Cond(labels=torch.ones(2, dtype=torch.int64))
EXECUTIONS = ["batched", "split"]


def known() -> Known:
    return Known(lambda t, label: t + 10 * label, outer=lambda t, label: torch.zeros_like(t))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_branches_that_come_later_have_memories_of_their_own(execution):
    """Uncond is asked for from t = 0.6 down: computed then, though cond is not, and from then on in cond's step."""
    module = known()
    within = guidance.create("interval", of=3.0, by="t", low=0.0, high=0.65)
    found = answers(
        module,
        TIMES,
        {"name": "interval", "every": 4},
        cond=ONE,
        uncond=ZERO,
        guidance=[within],
        execution=execution,
    )
    # cond: computed at 0.9 and 0.5; uncond at 0.6 (nothing remembered) and 0.5; the picture u + 3 (c - u)
    cond = [10 + t for t in (0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5)]
    uncond = [0.6, 0.5, 0.5, 0.5, 0.5]
    expected = cond[:3] + [u + 3 * (c - u) for c, u in zip(cond[3:], uncond, strict=True)]
    assert [float(x[0]) for x in found] == pytest.approx(expected, abs=1e-5)
    # rows that were computed: never those of the other branch too
    assert sum(module.rows) == 2 * (2 + 2)


def test_branches_that_pause_go_on_with_what_they_had():
    """Uncond is left out between 0.75 and 0.55; at 0.5 it is answered from memory, unless the rule computes."""
    module = known()
    late = guidance.create("interval", of=3.0, by="t", low=0.0, high=0.55)
    early = guidance.create("interval", of=3.0, by="t", low=0.75, high=1.0)
    found = answers(
        module, TIMES, {"name": "interval", "full_at": [0]}, cond=ONE, uncond=ZERO, guidance=[early, late]
    )
    both, alone = 0.9 + 3 * 10, 10.9
    assert [float(x[0]) for x in found] == pytest.approx([both, both, alone, alone] + [both] * 4, abs=1e-5)
    assert module.rows == [4]


@pytest.mark.parametrize("name", ["interval", "first_block", "taylor"])
@torch.no_grad()
def test_batched_and_split_are_the_same(name):
    module, (x, cond) = network("dit"), inputs("dit")
    other = Cond(tokens=-cond.tokens, mask=cond.mask)
    options = {"threshold": 0.6} if name == "first_block" else {}
    batched, split = (
        answers(
            module,
            TIMES,
            {"name": name, **options},
            x,
            cond,
            uncond=other,
            guidance=guidance.create("interval", of=2.0, by="t", low=0.35, high=0.75),
            execution=execution,
        )
        for execution in EXECUTIONS
    )
    for a, b in zip(batched, split, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_texts_of_other_lengths_leave_the_memory_valid():
    """Cond of three tokens alone, then beside an uncond of five (so padded): mmdit remembers the picture alone."""
    module, (x, cond) = network("mmdit"), inputs("mmdit")
    longer = Cond(
        tokens=torch.cat([cond.tokens, cond.tokens[:, :2]], 1), mask=torch.ones(len(x), 5, dtype=torch.bool)
    )
    strategy = guidance.create("interval", of=2.0, by="t", low=0.0, high=0.75)
    with counting() as count:
        answers(
            module, TIMES, {"name": "interval", "full_at": [0]}, x, cond, uncond=longer, guidance=strategy
        )
    assert count.asked - count.left_out == 2 * len(x)  # once for each branch


def test_several_networks_have_memories_of_their_own():
    strong, weak = known(), Known(lambda t, label: -t)
    found = answers(
        strong,
        TIMES[:4],
        {"name": "interval", "every": 2},
        cond=ONE,
        networks={"weak": weak},
        guidance=guidance.create("autoguidance", scale=2.0),
    )
    # cond + (cond - weak); the weak network's first block adds 1
    assert [float(x[0]) for x in found] == pytest.approx(
        [2 * (10 + t) - (1 - t) for t in (0.9, 0.9, 0.7, 0.7)], abs=1e-5
    )
    assert (strong.rows, weak.rows) == ([2, 2], [2, 2])


@pytest.mark.parametrize("kind", ["pag", "slg"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_changed_layers_inside_and_outside(kind, execution):
    """Layers that guidance changes lie in blocks that the cache may leave out; what is remembered is theirs."""
    module, (x, cond) = network("dit"), inputs("dit")
    layers = {"pag": [2], "slg": [2]}[kind]
    strategy = guidance.create(kind, layers=layers, scale=1.5)

    def run(cache, **options):
        return answers(module, TIMES, cache, x, cond, guidance=strategy, execution=execution, **options)

    plain, always = run(None), run({"name": "interval", "every": 1})
    for a, b in zip(plain, always, strict=True):  # a cache puts changed branches in calls of their own
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    with counting() as count:
        sparing = run({"name": "first_block", "threshold": 0.6})
    assert count.left_out > 0
    # by hand: the rule of first_block for each sample by itself, the same whatever the batch
    for i in range(len(x)):
        alone = answers(
            module, TIMES, {"name": "first_block", "threshold": 0.6}, x[i : i + 1], cond[i : i + 1],
            guidance=strategy, execution=execution,
        )  # fmt: skip
        for a, b in zip(sparing, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["pag", "slg"])
@torch.no_grad()
def test_layers_are_changed_for_the_right_samples_where_only_some_are_computed(kind):
    """The changed branch joins when cond is answered from memory: a call that computes the changed one alone."""
    module, (x, cond) = network("dit"), inputs("dit")
    late = guidance.create(
        "interval", of={"name": kind, "layers": [2], "scale": 1.5}, by="t", low=0.0, high=0.65
    )
    batched, split = (
        answers(module, TIMES, {"name": "interval", "every": 4}, x, cond, guidance=late, execution=execution)
        for execution in EXECUTIONS
    )
    for a, b in zip(batched, split, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_layer_that_takes_no_part_is_still_told_of():
    """Only what a cache left out is excused."""
    module, (x, cond) = network("dit"), inputs("dit")
    module.spare = type(module.blocks[0])(32, 2, False)
    strategy = guidance.create("slg", layers=["spare"])
    denoise = denoise_fn(module, FLOW, "x0", cond=cond, guidance=strategy, cache="interval").begin(TIMES)
    with pytest.raises(KitError, match="'spare' could not be changed"):
        denoise(x, 0.9)


@torch.no_grad()
def test_conditionings_that_change_at_every_step():
    """CADS gives other conditionings at every evaluation; a cache answers with what it computed from the last."""
    module, (x, cond) = network("dit"), inputs("dit")
    ends = []
    for cache in (None, {"name": "interval", "every": 1}, {"name": "interval", "every": 2}):
        strategies = [guidance.create("cads"), 2.0]
        other = Cond(tokens=torch.zeros_like(cond.tokens), mask=cond.mask)
        denoise = denoise_fn(module, FLOW, "flow", cond=cond, uncond=other, guidance=strategies, cache=cache)
        seeds = [torch.Generator().manual_seed(i) for i in range(len(x))]
        ends.append(samplers.create("euler").sample(denoise, x, FLOW, 4, generator=seeds))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.isfinite(ends[2]).all()


@torch.no_grad()
def test_times_as_tensors_are_never_read():
    """A grid for each sample: caches count evaluations, and no number comes back to the host."""
    module, (x, cond) = network("dit"), inputs("dit")
    grid = torch.tensor(TIMES).expand(len(x), -1)
    for name in ("interval", "taylor", "deep_cache"):
        denoise = denoise_fn(module, FLOW, "x0", cond=cond, cache=name).begin(grid)
        with counting() as count:
            found = [denoise(x, grid[:, i].clone()) for i in range(len(TIMES))]
        plain = answers(module, TIMES, name, x, cond)
        assert count.left_out > 0
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dit", "unet"])
@torch.no_grad()
def test_compiled_blocks_are_cached_like_others(kind):
    (x, cond), plain = inputs(kind), network(kind)
    compiled = network(kind)
    repeated = compiled.blocks if kind == "dit" else [u for level in compiled.down for u in level]
    for block in repeated:
        block.compile(backend="eager")
    for cache in ("interval", {"name": "first_block", "threshold": 0.6}):
        pairs = zip(
            answers(plain, TIMES, cache, x, cond), answers(compiled, TIMES, cache, x, cond), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["dit", "unet"])
@torch.no_grad()
def test_a_network_compiled_as_a_whole_is_one_graph_without_a_cache_and_refused_with_one(kind):
    (x, cond), plain = inputs(kind), network(kind)
    whole = torch.compile(network(kind), backend="eager", fullgraph=True)
    t = torch.full((len(x),), 0.5)
    torch.testing.assert_close(whole(x, t, cond), plain(x, t, cond))
    with pytest.raises(KitError, match="compile its blocks, not the whole"):
        denoise_fn(whole, FLOW, "x0", cond=cond, cache="interval")
    inside = network(kind)
    inside.compile(backend="eager")  # in place
    with pytest.raises(KitError, match="compile its blocks, not the whole"):
        denoise_fn(inside, FLOW, "x0", cond=cond, cache="interval")


def test_a_network_that_does_not_come_by_the_seam_is_told_when_it_is_called():
    """It says that it can be cut, and is not: its answer must not pass for a cached one."""
    module = known()
    module.forward = lambda x, t, cond=None: x
    run = caches.create("interval").begin(module)
    with pytest.raises(KitError, match="were not run where a cache can see them"):
        run(torch.zeros(2, 1, 1, 1), torch.zeros(2))


def test_what_a_cache_cannot_cut_is_told():
    x, t = torch.zeros(1, 3, 8, 8), 0.5
    with pytest.raises(KitError, match="between the blocks of the network: it says no places"):
        denoise_fn(lambda x, t: x, FLOW, "x0", cache="interval")
    with pytest.raises(KitError, match=r"cache depth 9: DiT can be cut at 1 to 3"):
        denoise_fn(network("dit"), FLOW, "x0", cache={"name": "interval", "depth": 9})
    strong, weak = network("dit"), network("dit", depth=1)
    with pytest.raises(KitError, match="between the blocks of DiT: it says no places"):
        denoise_fn(
            strong, FLOW, "x0", cond=inputs("dit")[1], networks={"weak": weak}, cache="interval",
            guidance=guidance.create("autoguidance", scale=2.0),
        )  # fmt: skip
    with pytest.raises(KitError, match="unknown cache 'nope'"):
        denoise_fn(strong, FLOW, "x0", cache="nope")
    assert denoise_fn(lambda x, t: x, FLOW, "x0")(x, t).shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["interval", "taylor", "deep_cache"])
@torch.no_grad()
def test_a_graph_holds_a_run_with_a_fixed_cache(name):
    from imagen_kit.samplers.graphs import graphed

    module, (x, cond) = network("dit").cuda().float(), inputs("dit")
    x, cond = x.float().cuda(), cond.to("cuda", torch.float32)
    denoise = denoise_fn(module, FLOW, "flow", cond=cond, cache=name)
    tableau = samplers.create("euler").tableau(FLOW, 6)
    expected = samplers.create("euler").sample(denoise, x, FLOW, 6)
    torch.testing.assert_close(graphed(denoise, tableau, x)(x), expected, atol=1e-5, rtol=1e-4)

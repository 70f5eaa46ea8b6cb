"""Caches that look at what they skip: first_block and accumulated."""

from __future__ import annotations

import math

import pytest
import torch
from cached_networks import Known, answers

from imagen_kit import caches
from imagen_kit.caches.first_block import change
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError

TIMES = [0.9, 0.8, 0.7, 0.55, 0.5, 0.3, 0.28, 0.1]
LABELS = torch.tensor([0, 1, 2, 3])  # the first block's change is t^label: from none at all to fast


def run(cache, times=TIMES, labels=LABELS) -> tuple[list[torch.Tensor], list[int]]:
    """Raw answers, and how many samples each evaluation computed."""
    module = Known(lambda t, label: 10 * t + label, outer=lambda t, label: t**label)
    x = torch.zeros(len(labels), 1, 1, 1, dtype=torch.float64)
    found, rows = [], []
    denoised = answers(module, times, cache, x, Cond(labels=labels))
    for answer in denoised:
        found.append(answer.flatten())
    rows = module.rows
    return found, rows


def expected(times, labels, wants) -> list[torch.Tensor]:
    """Answers where ``wants(memory, outer, number)`` decides for each sample by itself."""
    columns = []
    for label in labels.tolist():
        memory: dict = {}
        column = []
        for number, t in enumerate(times):
            outer = t**label
            if wants(memory, outer, number):
                memory.update(rest=10 * t + label, outer=outer, skips=0)
            else:
                memory["skips"] += 1
            memory["seen"] = outer
            column.append(outer + memory["rest"])
        columns.append(column)
    return [torch.tensor(row, dtype=torch.float64) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.41, 2.0])
@pytest.mark.parametrize(("warm_up", "most"), [(1, None), (3, None), (1, 2), (1, 0)])
def test_first_block_follows_its_rule_sample_by_sample(threshold, warm_up, most):
    def wants(memory, outer, number):
        if not memory or number < warm_up:
            return True
        if most is not None and memory["skips"] >= most:
            return True
        return not abs(outer - memory["outer"]) / memory["outer"] < threshold

    found, rows = run({"name": "first_block", "threshold": threshold, "warm_up": warm_up, "max_skips": most})
    for a, b in zip(found, expected(TIMES, LABELS, wants), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # times are told in float32
    if most == 0:
        assert rows == [4] * len(TIMES)
    elif threshold == 0.15 and warm_up == 1:
        assert 0 < min(rows) < max(rows) == 4  # some evaluations compute for some samples alone


@pytest.mark.parametrize("threshold", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("rescale", [(0.0, 1.0), (0.01, 0.5, 1.0)])
def test_accumulated_adds_up_the_changes_on_the_way(threshold, rescale):
    def wants(memory, outer, number):
        if not memory:
            return True
        step = abs(outer - memory["seen"]) / memory["seen"]
        total = memory.get("total", 0.0) + sum(c * step**i for i, c in enumerate(rescale))
        memory["total"] = 0.0 if total >= threshold else total
        return total >= threshold

    found, _ = run({"name": "accumulated", "threshold": threshold, "rescale": list(rescale)})
    for a, b in zip(found, expected(TIMES, LABELS, wants), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_path_that_comes_back_is_long_but_leads_nowhere():
    """The two rules differ on an outer part that goes up and down: the way along the path is what adds up."""
    swing = Known(lambda t, label: t, outer=lambda t, label: 1 + 0.2 * (10 * t).round().remainder(2))
    times = [0.8, 0.7, 0.6, 0.5, 0.4]
    answers(swing, times, {"name": "first_block", "threshold": 0.3})
    assert swing.rows == [2]
    swing.rows.clear()
    answers(swing, times, {"name": "accumulated", "threshold": 0.3})
    assert len(swing.rows) > 1


def test_change_is_relative_and_each_samples_own():
    then = torch.tensor([[1.0, -1.0], [10.0, 10.0], [0.0, 0.0]])
    now = torch.tensor([[1.5, -1.0], [10.0, 9.0], [0.0, 0.0]])
    found = change(now, then)
    torch.testing.assert_close(found[:2], torch.tensor([0.25, 0.05]))
    assert math.isnan(found[2])


def test_where_there_is_nothing_to_measure_everything_is_computed():
    """A first block that changes nothing (gates that start at zero) gives 0 / 0."""
    module = Known(lambda t, label: t, outer=lambda t, label: torch.zeros_like(t))
    for name in ("first_block", "accumulated"):
        module.rows.clear()
        answers(module, TIMES, {"name": name, "threshold": 5.0})
        assert module.rows == [2] * len(TIMES)


def test_one_read_from_the_device_a_call(monkeypatch):
    """However many branches a call holds: the host asks once, and never for a single number."""
    reads = []
    for way in ("tolist", "item", "__bool__", "__float__"):
        plain = getattr(torch.Tensor, way)

        def counted(self, way=way, plain=plain):
            reads.append(way)
            return plain(self)

        monkeypatch.setattr(torch.Tensor, way, counted)
    module = Known(lambda t, label: t, outer=lambda t, label: t)
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    label = Cond(labels=torch.zeros(2, dtype=torch.int64))
    for name, expect in (
        ("first_block", 1),
        ("accumulated", 1),
        ("interval", 0),
        ("taylor", 0),
        ("deep_cache", 0),
    ):
        reads.clear()
        answers(module, TIMES, name, x, label, uncond=label, guidance=2.0)
        # nothing is remembered, and so nothing read, at the first
        assert reads == ["tolist"] * (expect * (len(TIMES) - 1)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["first_block", "accumulated"])
def test_a_graph_cannot_hold_them(name):
    module = Known(lambda t, label: t)
    run = caches.create(name).begin(module)
    x, t = torch.zeros(2, 1, 1, 1, device="cuda"), torch.zeros(2, device="cuda")
    run(x, t)
    torch.cuda.synchronize()
    with (
        pytest.raises(KitError, match="a CUDA graph cannot hold it"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run(x, t)

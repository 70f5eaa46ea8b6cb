"""Rows with a floor: what is measured agrees with known tensors and with torch's own count; how it is told."""

from __future__ import annotations

import copy

import pytest
import torch

from imagen_kit.bench import comparison, floor, headroom, memory, table
from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import Measurer
from imagen_kit.bench.subject import OURS, Case
from imagen_kit.bench.subjects import build
from imagen_kit.bench.work import Work

CPU = torch.device("cpu")
MIB = 1 << 20


def megabytes(count: float) -> torch.Tensor:
    return torch.ones(int(count * MIB) // 4)


def chain() -> torch.Tensor:
    """Pieces of several sizes that come and go."""
    x = megabytes(8)
    for _ in range(6):
        y = torch.cat([x, megabytes(4)])  # 8, 4 and 12
        z = y * 2  # 8, 12 and 12; the 4 are gone
        x = (
            z[: x.numel()] + 1
        ) / 2  # 8, 12, 12, and two of 8 after the first of them: see ``largest_moment``
        del y, z
    return x


LARGEST_MOMENT = 8 + 12 + 12 + 8 + 8


def counted(work) -> int:
    """The most bytes of torch's own CPU allocator, from the profiler's record of every piece taken and freed."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_measured_peak_is_that_of_the_tensors():
    chain()
    with memory.Extra(CPU) as extra:
        chain()
    assert extra.bytes == pytest.approx(LARGEST_MOMENT * MIB, abs=1.5 * MIB)  # the interpreter's own pages
    assert counted(chain) == pytest.approx(LARGEST_MOMENT * MIB, abs=1000)  # single numbers of the operations


@pytest.fixture(scope="module")
def row() -> dict:
    measure = Measurer(build, CPU, Protocol(warm_up=1, least=2, most=2, seconds=0))
    return measure(Case("memory", "dit-xl-2-256", {"size": "tiny", "steps": 1, "peers": "none"}))


def test_a_row_has_the_peak_over_the_least(row):
    entry = row["entries"][OURS]
    found = entry["floor"]
    assert found["weights"] == entry["weight_bytes"]
    assert (
        found["peak"] == entry["peak_bytes"] == entry["activation_bytes"] + found["weights"] + found["inputs"]
    )
    assert found["over_alive"] == found["peak"] / (found["weights"] + found["alive"])
    assert found["over_largest"] == found["peak"] / (found["weights"] + found["largest"])
    assert 0 < found["largest"] <= found["alive"]
    assert found["process"] > found["weights"]


def test_it_has_columns_of_its_own(row):
    assert headroom.told([row])
    cells = headroom.lines(row, table.number, table.duration)
    assert len(cells) == len(headroom.COLUMNS) - 1
    for text in (table.screen([row]), table.markdown([row])):
        assert "peak/(weights + alive)" in text
        assert f"{row['entries'][OURS]['floor']['over_alive']:.2f}" in text


def test_peers_stand_beside_by_their_own_floor(row):
    both = copy.deepcopy(row)
    both["entries"]["diffusers"] = copy.deepcopy(row["entries"][OURS])
    both["entries"]["diffusers"]["floor"] |= {"peak": 12 * MIB, "over_alive": 1.234, "over_largest": 2.345}
    both["entries"]["other"] = {"status": "skipped", "reason": "absent"}
    assert headroom.lines(both, table.number, table.duration)[-1] == (
        "diffusers: 12.0 MiB (1.23, 2.35), other: skipped"
    )


def test_rows_from_before_are_told_as_they_were(row):
    old = copy.deepcopy(row)
    del old["entries"][OURS]["floor"]
    assert not headroom.told([old])
    assert "peak MiB" in table.screen([old])
    lost = {**old, "entries": {}, "status": "failed", "reason": "it broke"}
    assert not headroom.told([lost])
    assert headroom.lines(lost, table.number, table.duration)[-1] == "it broke"


def test_a_comparison_tells_how_far_above_the_floor(row):
    after = copy.deepcopy(row)
    after["entries"][OURS]["floor"]["over_alive"] = 2.5
    before = row["entries"][OURS]["floor"]["over_alive"]
    (change,) = comparison.changes({"rows": [row]}, {"rows": [after]})
    assert change.floor == (before, 2.5)
    text = "\n".join(comparison._figures({"rows": [row]}, {"rows": [after]}))
    assert f"{before:.2f} -> 2.50" in text


def test_reading_in_counts_for_the_peak():
    """What was held while weights were read is what a machine needs."""
    subject = Work(lambda: torch.ones(10), "prompts", 1)
    subject.loading = 123 * MIB
    measure = Measurer(
        lambda case, device: {OURS: subject}, CPU, Protocol(warm_up=1, least=2, most=2, seconds=0)
    )
    entry = measure(Case("text_encoder", "t5"))["entries"][OURS]
    assert entry["peak_bytes"] == entry["loading_bytes"] == 123 * MIB


def test_the_ratios_of_a_floor():
    found = floor.Needed(weights=100, inputs=5, largest=50, operation="add", alive=100, peak=220)
    assert found.over_alive == 1.1
    assert found.over_largest == pytest.approx(220 / 150)

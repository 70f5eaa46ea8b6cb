"""Rows of subjects whose truth is known, and of subjects that go wrong."""

from __future__ import annotations

import json

import pytest
import torch

from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import FAILED, NO_MEMORY, OK, SKIPPED, Measurer, _precision, fault
from imagen_kit.bench.subject import Case, Subject
from imagen_kit.bench.subjects import build

QUICK = Protocol(least=2, most=3, seconds=0.0)
TOP = {"matmul": {"fp32": {"flops": 1e10}}, "copy": {"bytes": 1e9}}


@pytest.fixture
def measure(fakes):
    measurer = Measurer(build, torch.device("cpu"), QUICK, TOP)
    return lambda name, n=32: measurer(Case("fake", name, {"n": n}))


def test_figures_of_a_product(measure):
    row = measure("matmul")
    entry = row["entries"]["imagen_kit"]
    seconds = entry["seconds"]["median"]
    assert (row["id"], row["status"], row["options"]) == ("fake/matmul/n=32", OK, {"n": 32})
    assert entry["flops"] == 2 * 32**3
    assert entry["bytes"] == entry["least_bytes"] == 3 * 4 * 32 * 32
    assert entry["weight_bytes"] == 4 * 32 * 32
    assert entry["parameters"] == 32 * 32
    assert entry["tflops"] == pytest.approx(2 * 32**3 / seconds / 1e12)
    assert entry["percent_of_matmul"] == pytest.approx(100 * 2 * 32**3 / seconds / 1e10)
    assert entry["gbps"] == pytest.approx(3 * 4 * 32 * 32 / seconds / 1e9)
    assert entry["percent_of_copy"] == pytest.approx(100 * 3 * 4 * 32 * 32 / seconds / 1e9)
    assert entry["per_second"] == pytest.approx(32 / seconds)
    assert entry["seconds"]["least"] <= entry["seconds"]["quartiles"][0] <= seconds
    assert entry["peak_bytes"] == entry["activation_bytes"] + 2 * 4 * 32 * 32
    assert entry["waits_per_step"] == 0
    assert entry["precision"] == "fp32"
    json.dumps(row, allow_nan=False)


def test_peers_stand_beside_with_the_difference_of_their_results(measure):
    row = measure("matmul")
    assert list(row["entries"]) == ["imagen_kit", "one more", "sleeper", "other weights", "absent"]
    assert row["difference"]["sleeper"] == {"max_abs": 0.0, "relative": 0.0, "rms": 0.0}
    more = row["difference"]["one more"]
    assert more["max_abs"] == pytest.approx(1.0, abs=1e-5)
    assert more["rms"] == pytest.approx(more["relative"], rel=1e-4)  # the same everywhere
    assert "other weights" not in row["difference"]  # a network of its own
    assert set(row["ratio"]) == {"one more", "sleeper", "other weights"}
    assert row["ratio"]["sleeper"] > 20  # it sleeps 20 ms, the product takes some µs
    low, high = row["ratio_quartiles"]["sleeper"]
    assert low <= row["ratio"]["sleeper"] <= high
    assert row["entries"]["absent"] == {"status": SKIPPED, "reason": "absent is not installed"}


def test_the_relative_difference_is_over_the_root_mean_square(measure, fakes, monkeypatch):
    def pair(n):
        ours = torch.tensor([3.0, 4.0, 0.0, 0.0])  # rms 2.5
        theirs = ours + torch.tensor([0.0, 0.0, 0.5, 0.0])
        return {"imagen_kit": fakes.Fake(lambda: ours), "peer": fakes.Fake(lambda: theirs)}

    monkeypatch.setitem(fakes.FAKES, "matmul", pair)
    assert measure("matmul")["difference"]["peer"] == pytest.approx(
        {"max_abs": 0.5, "relative": 0.2, "rms": 0.1}
    )


def test_bytes_of_a_copy(measure):
    entry = measure("copy", 10_000)["entries"]["imagen_kit"]
    assert (entry["bytes"], entry["flops"], entry["tflops"]) == (80_000, 0, 0.0)
    assert entry["percent_of_matmul"] is None


def test_waits_a_step(measure):
    entry = measure("loop", 8)["entries"]["imagen_kit"]
    assert entry["waits_per_step"] == 1.25
    assert (entry["steps"], entry["unit"], entry["units"]) == (8, "steps", 8)


def test_more_memory_than_there_is_costs_an_entry_and_the_others_go_on(measure):
    row = measure("allocation")
    assert row["status"] == row["entries"]["imagen_kit"]["status"] == NO_MEMORY
    assert row["entries"]["modest"]["status"] == OK
    assert row["ratio"] == row["difference"] == {}


def test_what_goes_wrong_is_told(measure):
    assert measure("greedy")["status"] == NO_MEMORY
    assert measure("nothing")["status"] == SKIPPED
    assert measure("nothing")["reason"] == "needs a GPU"
    row = measure("wrong")
    assert (row["status"], row["reason"]) == (FAILED, "ValueError: no such thing")


def test_one_that_fails_while_it_is_timed_leaves_the_others_to_be_timed_again(measure):
    row = measure("late")
    assert row["status"] == OK
    assert row["entries"]["late"]["status"] == NO_MEMORY
    assert 2 <= row["entries"]["imagen_kit"]["seconds"]["repeats"] <= 3


def test_results_of_different_shape_are_no_row(measure):
    row = measure("unlike")
    assert row["status"] == FAILED
    assert "longer answers with (33,), imagen_kit with (32,)" in row["reason"]


def test_an_unknown_option_is_a_failed_row(fakes):
    row = Measurer(build, torch.device("cpu"), QUICK)(Case("fake", "matmul", {"m": 3}))
    assert row["status"] == FAILED
    assert "has no option 'm'; it takes name, device, n, shade" in row["reason"]


def test_every_subject_is_closed_also_when_something_fails(measure, fakes, monkeypatch):
    closed = []

    class Watched(fakes.Fake):
        def close(self):
            closed.append(self)

    monkeypatch.setattr(fakes, "Fake", Watched)
    measure("matmul")
    assert len(closed) == 4
    measure("allocation")
    assert len(closed) == 6
    measure("unlike")
    assert len(closed) == 8


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), NO_MEMORY),
        (MemoryError(), NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), NO_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), NO_MEMORY),
        (RuntimeError("shapes do not fit"), FAILED),
        (ValueError("out of memory"), FAILED),
    ],
)
def test_which_errors_are_a_want_of_memory(error, status):
    assert fault(error)[0] == status


def test_energy_is_read_where_the_protocol_asks(fakes, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("imagen_kit.bench.measure.find_meter", lambda device: lambda: float(next(ticks)))
    protocol = Protocol(least=2, most=2, energy_seconds=1e-9)
    row = Measurer(build, torch.device("cpu"), protocol)(Case("fake", "copy", {}))
    assert row["entries"]["imagen_kit"]["joules"] == 1.0


def test_what_cannot_be_counted_is_timed_all_the_same(measure, fakes, monkeypatch):
    class Opaque(fakes.Fake):
        def eager(self):
            raise NotImplementedError("no such kernel")

    monkeypatch.setitem(
        fakes.FAKES, "copy", lambda n: {"imagen_kit": Opaque(lambda: torch.zeros(n), note="fast")}
    )
    row = measure("copy")
    entry = row["entries"]["imagen_kit"]
    assert row["status"] == OK
    assert entry["seconds"]["median"] > 0
    assert entry["flops"] is entry["bytes"] is entry["tflops"] is None
    assert entry["note"] == "fast; not counted: NotImplementedError: no such kernel"


def test_compiled_code_is_not_thrown_away_within_a_row(measure, fakes, monkeypatch):
    import torch._dynamo

    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    measure("late")
    assert len(resets) == 1  # after the row, though a peer failed within it


def test_the_precision_is_that_of_most_weights():
    edges, inner = torch.nn.Linear(4, 4), torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    subject = Subject()
    assert _precision(subject, torch.device("cpu")) == "fp32"
    subject.modules = [edges, inner]
    assert _precision(subject, torch.device("cpu")) == "bf16"

"""Workers that die, results that are gone on with, budgets, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from imagen_kit.bench import engine, store
from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import FAILED, NO_MEMORY, OK, SKIPPED
from imagen_kit.bench.subject import Case
from imagen_kit.errors import KitError

CPU = torch.device("cpu")
QUICK = Protocol(least=2, most=2, seconds=0.0)
TOP = {"matmul": {"fp32": {"flops": 1e11, "side": 1}}, "copy": {"bytes": 1e10, "size": 1}}


def case(name, n=32):
    return Case("fake", name, {"n": n})


def plan(*cases, protocol=QUICK, **more):
    return engine.Plan(list(cases), CPU, protocol, **{"one_process": True, "tiny": True, **more})


class Hand:
    """A crew that writes rows without a process."""

    measured: list[str] = []
    limits: list[float] = []

    def __init__(self, plan, results):
        results.content["ceilings"] = results.content["ceilings"] or TOP

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, case, limit):
        from imagen_kit.bench.measure import blank

        Hand.measured.append(case.id)
        Hand.limits.append(limit)
        return blank(case, {"wrong": FAILED, "greedy": NO_MEMORY}.get(case.name, OK))


@pytest.fixture
def by_hand(fakes, monkeypatch):
    monkeypatch.setattr(engine, "Crew", Hand)
    monkeypatch.setattr(Hand, "measured", [])
    return Hand.measured


def test_rows_of_workers_that_die_and_of_those_after_them(fakes, tmp_path):
    names = ("talks", "killed", "crash", "leave", "nothing", "copy")
    seen = []
    content = engine.run(
        plan(*map(case, names)), tmp_path / "r.json", told=lambda row, done, total: seen.append((done, total))
    )
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == list(names)
    states = [OK, NO_MEMORY, FAILED, FAILED, SKIPPED, OK]
    assert [row["status"] for row in rows.values()] == states
    assert "signal 9" in rows["killed"]["reason"]
    assert rows["crash"]["reason"] == "the process crashed: SIGSEGV"
    assert rows["leave"]["reason"] == "the process ended with code 7: some library gave up"
    assert seen == [(i, 6) for i in range(1, 7)]
    assert content == json.loads((tmp_path / "r.json").read_text())
    assert set(content["ceilings"]["matmul"]) >= {"fp32"}
    copied = rows["copy"]["entries"]["imagen_kit"]
    share = 100 * copied["gbps"] * 1e9 / content["ceilings"]["copy"]["bytes"]
    assert copied["percent_of_copy"] == pytest.approx(share)


def test_a_row_that_does_not_end_is_given_up(fakes, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    results = store.Results(tmp_path / "r.json", store.environment(CPU), QUICK, fresh=True)
    results.content["ceilings"] = TOP
    with engine.Crew(plan(case("stuck")), results) as crew:
        row = crew.measure(case("stuck"), 8.0)
    assert (row["status"], row["reason"]) == (FAILED, "took longer than 8 s")


def test_what_is_there_is_not_measured_again(by_hand, tmp_path):
    file = tmp_path / "r.json"
    engine.run(plan(case("matmul"), case("greedy"), case("wrong")), file)
    before = json.loads(file.read_text())["rows"]
    by_hand.clear()
    content = engine.run(plan(case("copy"), case("matmul"), case("greedy"), case("wrong")), file)
    assert by_hand == [case("copy").id, case("wrong").id]  # a failure may have been mended
    assert content["rows"][:2] == before[:2]
    assert [row["name"] for row in content["rows"]] == ["matmul", "greedy", "copy", "wrong"]


def test_rows_outside_of_the_selection_stay(by_hand, tmp_path):
    engine.run(plan(case("matmul"), case("copy")), tmp_path)
    content = engine.run(plan(case("loop")), tmp_path)
    assert [row["name"] for row in content["rows"]] == ["matmul", "copy", "loop"]
    assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["environment"].update(device="Abacus"), "device = 'Abacus', not "),
        (
            lambda content: content["environment"]["versions"].update(torch="1.0"),
            "versions.torch = '1.0', not ",
        ),
        (lambda content: content["environment"]["versions"].update(jax="3"), "versions.jax = '3', not None"),
        (lambda content: content["environment"].update(threads=99), "threads = 99, not "),
        (lambda content: content["protocol"].update(least=77), "least = 77, not 2"),
    ],
)
def test_results_of_another_machine_are_refused_and_overwritten_on_demand(by_hand, tmp_path, change, said):
    file = tmp_path / "r.json"
    content = engine.run(plan(case("matmul")), file)
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(KitError, match="--fresh to overwrite") as error:
        engine.run(plan(case("matmul")), file)
    assert said in str(error.value)
    by_hand.clear()
    engine.run(plan(case("copy")), file, fresh=True)
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["copy"]


def test_other_files_are_not_taken_for_results(by_hand, tmp_path):
    file = tmp_path / "r.json"
    for text, said in (
        ("{}", "is not a results file"),
        ("{", "is not JSON"),
        ("[]", "is not a results file"),
    ):
        file.write_text(text)
        with pytest.raises(KitError, match=said):
            engine.run(plan(case("matmul")), file)
        assert file.read_text() == text


def test_rows_that_would_begin_too_late_wait_for_the_next_call(by_hand, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    cases = [case("matmul"), case("copy"), case("loop")]

    def told(row, done, total):
        now[0] += 10

    monkeypatch.setattr(Hand, "limits", [])
    content = engine.run(plan(*cases, budget=15.0, protocol=Protocol(limit=52.0)), tmp_path, told=told)
    assert Hand.limits == [52.0, 15.0 - 10.0 + engine.GRACE]
    assert [row["name"] for row in content["rows"]] == ["matmul", "copy"]
    assert content["not_run"] == [cases[2].id]
    content = engine.run(plan(*cases, budget=15.0, protocol=Protocol(limit=52.0)), tmp_path, told=told)
    assert [row["name"] for row in content["rows"]] == ["matmul", "copy", "loop"]
    assert content["not_run"] == []
    assert content["seconds"] == 10.0  # what was told after each row is not in it


def test_nothing_is_measured_when_a_case_cannot_be(by_hand, tmp_path):
    for wrong, said in (
        (Case("fake", "matmull", {}), "unknown fake 'matmull'; did you mean 'matmul'"),
        (Case("fake", "matmul", {"m": 1}), "a fake case has no option 'm'"),
        (Case("fale", "matmul", {}), "unknown bench kind 'fale'; did you mean 'fake'"),
    ):
        with pytest.raises(KitError, match=said):
            engine.run(plan(case("matmul"), wrong), tmp_path / "r.json")
    assert by_hand == []
    assert not (tmp_path / "r.json").exists()


def test_one_worker_for_each_model_or_for_all(fakes, tmp_path, monkeypatch):
    crews = []

    class Counted(Hand):
        def __init__(self, plan, results):
            super().__init__(plan, results)
            crews.append(self)

    monkeypatch.setattr(engine, "Crew", Counted)
    cases = [case("matmul"), case("matmul", 8), case("copy")]
    engine.run(plan(*cases, one_process=False), tmp_path / "a")
    assert len(crews) == 2
    engine.run(plan(*cases, one_process=True), tmp_path / "b")
    assert len(crews) == 3


INTERRUPTED = """
import sys; sys.path.insert(0, {plugin!r})
from imagen_kit.cli import main
sys.exit(main(["bench", "--suite", {suite!r}, "-o", {output!r}]))
"""


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(fakes, tmp_path):
    suite, output = tmp_path / "mine.yaml", tmp_path / "r.json"
    suite.write_text(
        "protocol: {least: 2, most: 2, seconds: 0}\nprocesses: one\n"
        "cases: [{kind: fake, name: [talks, stuck]}]\n"
    )
    plugin = os.path.dirname(fakes.__file__)
    program = INTERRUPTED.format(plugin=plugin, suite=str(suite), output=str(output))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1/2 fake/talks")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    content = json.loads(output.read_text())
    assert [row["name"] for row in content["rows"]] == ["talks"]
    assert content["not_run"] == ["fake/stuck"]

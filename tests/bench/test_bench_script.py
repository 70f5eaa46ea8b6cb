"""The one script for a GPU, its whole way gone on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imagen_kit.bench import engine
from imagen_kit.bench.measure import blank

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_row_of_the_gpu_suite_runs_in_its_tiny_form(tmp_path):
    """From a folder that is not the checkout, with nothing but the interpreter."""
    file = tmp_path / "gpu.json"
    words = [sys.executable, str(SCRIPT), "-o", str(file), "--cpu-test"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(file.read_text())
    assert content["not_run"] == []
    assert len(content["rows"]) >= 20
    others = [(row["id"], row["reason"]) for row in content["rows"] if row["status"] != "ok"]
    assert all("pip install" in reason for _, reason in others), others  # of a package that is not there
    assert len(others) <= 2
    kinds = {row["kind"] for row in content["rows"]}
    assert kinds >= {
        "denoiser",
        "training",
        "recipe",
        "text_encoder",
        "codec",
        "sampler",
        "memory",
        "startup",
        "gain",
    }
    assert "ceilings: fp32" in done.stdout
    assert "not run: none" in done.stdout


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench_gpu_script", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    before = signal.getsignal(signal.SIGTERM)
    yield loaded
    signal.signal(signal.SIGTERM, before)


class Answers:
    """In the place of the engine's workers: every row is answered at once, until one asks the process to end."""

    def __init__(self, plan, results, last=10**9):
        self.last, self.asked = last, 0

    def __enter__(self):
        return self

    def __exit__(self, *raised): ...

    def measure(self, case, limit):
        self.asked += 1
        if self.asked > self.last:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("the signal was not heard")
        return blank(case, "ok")


def test_asked_to_end_it_leaves_a_file_that_can_be_gone_on_with(script, tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    monkeypatch.setattr(engine, "Crew", lambda plan, results: Answers(plan, results, last=2))
    with pytest.raises(SystemExit) as ended:
        script.main(["-o", str(file), "--cpu-test", "--budget", "1e9"])
    assert ended.value.code == 143
    content = json.loads(file.read_text())
    first = [row["id"] for row in content["rows"]]
    assert len(first) == 2
    assert content["not_run"]
    monkeypatch.setattr(engine, "Crew", Answers)
    monkeypatch.setattr("imagen_kit.bench.table.screen", lambda rows: "")
    assert script.main(["-o", str(file), "--cpu-test", "--budget", "1e9"]) == 0
    content = json.loads(file.read_text())
    assert [row["id"] for row in content["rows"]][:2] == first
    assert len(content["rows"]) > 20
    assert content["not_run"] == []


def test_results_of_another_machine_are_kept_beside(script, tmp_path, monkeypatch, capsys):
    """A machine is lent anew for every call, and its driver may be another."""
    file = tmp_path / "r.json"
    monkeypatch.setattr(engine, "Crew", Answers)
    monkeypatch.setattr("imagen_kit.bench.table.screen", lambda rows: "")
    asked = ["-o", str(file), "--cpu-test", "--budget", "1e9", "--only", "startup"]
    assert script.main(asked) == 0
    older = json.loads(file.read_text())
    older["environment"]["cores"] = 10**6
    file.write_text(json.dumps(older))
    assert script.main(asked) == 0
    assert json.loads((tmp_path / "r.before.json").read_text()) == older
    assert json.loads(file.read_text())["environment"]["cores"] != 10**6
    assert "begun anew, and the file kept as r.before.json: " in capsys.readouterr().out


def test_a_missing_package_is_said_in_a_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagen_kit.bench.suite", None)
    monkeypatch.delattr("imagen_kit.bench.suite")
    assert script.main(["-o", str(tmp_path / "r.json"), "--cpu-test"]) == 2
    assert "nothing is downloaded: put it on PYTHONPATH" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so(script, tmp_path, capsys):
    assert script.main(["-o", str(tmp_path / "r.json")]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert script.main(["-o", str(tmp_path / "r.json"), "--cpu-test", "--only", "nothing-like-it"]) == 2
    assert "no row matches 'nothing-like-it'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

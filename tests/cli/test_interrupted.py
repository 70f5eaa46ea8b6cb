"""Ctrl-C, a real one: one line that says how to go on, exit code 130, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPT = "a small red star on a white background"
PATIENCE = 120.0  # seconds that a process may take to get where it is interrupted, on a busy machine


def interrupted(words, folder: Path, when, before: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that gets SIGINT as soon as ``when(stderr so far)``.

    Args:
        words: of the command.
        folder: it runs in.
        when: is it time?
        before: code that it runs first.
    """
    code = f"{before}\nimport sys\nfrom imagen_kit.cli import main\nsys.exit(main())"
    with open(folder.parent / "said", "w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell without job control, as some test runners have, starts its children deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not when(Path(said.name).read_text(encoding="utf-8")):
                assert process.poll() is None, "it ended before it was interrupted"
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        return process.returncode, out, Path(said.name).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "in"
    inner.mkdir()
    return inner


def last_line(code: int, err: str) -> str:
    assert code == 130, err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_generate(folder):
    words = ["generate", PROMPT, "--recipe", "tiny", "--steps", 1000, "-o", "pictures"]
    code, out, err = interrupted(words, folder, lambda said: "thread" in said)  # it says how, and then draws
    line = "interrupted: no picture was written; the same command draws the same ones"
    assert (last_line(code, err), out) == (line, "")
    assert list(folder.iterdir()) == []


def test_evaluate(folder):
    words = ["evaluate", "pocket-imagen", "-n", 5000, "--batch-size", 2, "-o", "accuracy.json"]
    started = time.monotonic()
    code, out, err = interrupted(words, folder, lambda _: time.monotonic() > started + 3)
    assert last_line(code, err).startswith("interrupted: nothing was written; the same command begins anew")
    assert out == ""
    assert list(folder.iterdir()) == []


def test_compare_keeps_what_it_measured(folder):
    words = [
        "compare",
        "tiny",
        "--samplers",
        "ddim",
        "--steps",
        "1,1000",
        "-n",
        50,
        "--reference",
        "ddim@2",
        "-o",
        "c",
    ]
    results = folder / "c" / "results.json"

    def measured(_):
        return results.exists() and json.loads(results.read_text())["cells"]

    code, out, err = interrupted(words, folder, measured)
    line = "interrupted: what was measured is in c/results.json; the same command goes on with the rest"
    assert (last_line(code, err), out) == (line, "")
    assert [cell["steps"] for cell in json.loads(results.read_text())["cells"]] == [1]
    assert not list(folder.rglob("*.tmp*"))


def test_train_before_and_after_a_checkpoint(folder):
    words = [
        "train",
        "tiny",
        "--steps",
        100_000,
        "--set",
        "train.stage=base",
        "--set",
        "train.batch_size=2",
        "-o",
        "r",
    ]
    begun = folder / "r" / "log"
    code, _, err = interrupted(words, folder, lambda _: begun.exists())
    assert last_line(code, err).startswith(
        "interrupted: there is no checkpoint yet, and the same command begins anew"
    )
    kept = folder / "r" / "checkpoint.pt"
    often = [*words, "--set", "train.checkpoint_every=1"]
    code, _, err = interrupted(often, folder, lambda _: kept.exists())
    assert last_line(code, err) == "interrupted: the same command with --resume goes on from r/checkpoint.pt"


SMALL_CEILINGS = """
from imagen_kit.bench import engine
plan = engine.Plan
engine.Plan = lambda *args, **given: plan(*args, **{**given, "tiny": True})
"""
SUITE = """
description: A quick row and one that never ends.
protocol: {warm_up: 1, least: 2, most: 2, seconds: 0.1}
processes: one
cases:
  - {kind: sampler, name: ddim, options: {steps: 2, resolution: 8, peers: none}}
  - {kind: sampler, name: ddim, options: {steps: 900, resolution: 512, batch: 64, peers: none}}
"""


def test_bench_keeps_finished_rows(folder):
    (folder / "suite.yaml").write_text(SUITE)
    words = ["bench", "--suite", "suite.yaml", "--fresh", "--device", "cpu", "-o", "b"]
    code, out, err = interrupted(words, folder, lambda said: "1/2 " in said, SMALL_CEILINGS)
    kept = "b/results.json"
    line = (
        f"interrupted: finished rows are in {kept}; the same command without --fresh goes on with the others"
    )
    assert (last_line(code, err), out) == (line, "")
    content = json.loads((folder / kept).read_text())
    assert (len(content["rows"]), len(content["not_run"])) == (1, 1)
    assert [path.name for path in (folder / "b").iterdir()] == ["results.json"]


def test_a_command_that_has_nothing_to_advise(folder):
    """In a command without advice."""
    script = "from imagen_kit.cli import app, main\ndef stopped(): raise KeyboardInterrupt\n"
    script += "app.command('stopped')(stopped)\nraise SystemExit(main(['stopped']))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")

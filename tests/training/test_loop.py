"""The training loop: schedules of the rate, averaging, and a resume that changes nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError
from imagen_kit.training import loop, run, state
from imagen_kit.training.config import OptimizerConfig, TrainConfig

TINY = [
    "train.steps=6",
    "train.batch_size=2",
    "train.checkpoint_every=1",
    "train.sample_every=100",
    "train.log_every=1",
    "train.precision=fp32",
]


class Line:
    """y = w x on points of y = 3 x: a task whose solution is known."""

    def __init__(self, config: TrainConfig):
        self.config = config
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))

    def loss(self, module: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        x = torch.randn(self.config.batch_size, 1, generator=generator)
        return {"loss": (module(x) - 3 * x).square().mean()}

    def preview(self, module: nn.Module) -> str:
        return "line"

    def export(self, weights: dict[str, Tensor], folder: Path, facts: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / "line.pt")


def config(**changes) -> TrainConfig:
    base = {
        "steps": 300,
        "batch_size": 8,
        "precision": "fp32",
        "checkpoint_every": 50,
        "log_every": 10,
        "ema": 0.9,
    }
    return TrainConfig(**{**base, **changes})


@pytest.mark.parametrize("decay", ["cosine", "linear", "cooldown"])
def test_learning_rate_warms_up_and_ends_at_zero(decay):
    c = OptimizerConfig(learning_rate=2.0, warmup=10, decay=decay, cooldown=0.25)
    rates = [loop.learning_rate(c, step, 110) for step in range(111)]
    assert rates[4] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    if decay == "cooldown":
        assert rates[84] == 2.0  # still on the plateau
        assert rates[85 + 13] == pytest.approx(2.0 * 12 / 25)  # 12 of the last 25 steps left
    if decay == "cosine":
        assert rates[60] == pytest.approx(1 + math.cos(math.pi / 2))


def test_ema_follows_its_recurrence():
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(0.0)
    ema = state.Ema(module, 0.5)
    expected = 0.0
    for step in range(20):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)  # float32 against float64


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_task_with_a_known_solution_is_learned(tmp_path, name):
    task = Line(config(optimizer={"learning_rate": 0.05, "warmup": 5, "name": name}))
    last = loop.train(task, tmp_path, progress=False)
    weights = torch.load(tmp_path / "weights" / "line.pt", weights_only=True)
    slope = (weights["1.weight"] @ weights["0.weight"]).item()
    assert slope == pytest.approx(3.0, abs=0.05)  # the average lags a little behind the last weights
    assert last["loss"] < 0.01


def test_resume_is_exact(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    loop.train(Line(config(steps=40, checkpoint_every=10)), whole, progress=False)

    class Stopped(Line):
        calls = 0

        def loss(self, module, generator, device):
            self.calls += 1
            if self.calls == 26:  # after the checkpoint of step 20, in the middle of step 26
                raise KeyboardInterrupt
            return super().loss(module, generator, device)

    with pytest.raises(KeyboardInterrupt):
        loop.train(Stopped(config(steps=40, checkpoint_every=10)), halves, progress=False)
    assert state.load(halves)["step"] == 20
    loop.train(Line(config(steps=40, checkpoint_every=10)), halves, resume=True, progress=False)
    a, b = state.load(whole), state.load(halves)
    for key in ("module", "ema"):
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name])


def test_resume_without_or_with_a_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(KitError, match="nothing to resume"):
        state.load(tmp_path)
    (tmp_path / state.CHECKPOINT).write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(KitError, match="cannot be read"):
        state.load(tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path, request):
    """kill -9 in the middle of a real stage's training, then --resume: the same weights to the bit."""
    overrides = [*TINY, "train.stage=base", "train.steps=12"]
    # Sums split over threads may round differently from one process to the next: one thread, to compare bits.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    run("tiny", tmp_path / "whole", overrides=overrides, progress=False)
    command = [sys.executable, "-m", "imagen_kit", "train", "tiny", "-o", str(tmp_path / "killed")]
    for override in overrides:
        command += ["--set", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    checkpoint = tmp_path / "killed" / state.CHECKPOINT
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    before = state.load(tmp_path / "killed")["step"]
    assert 1 <= before <= 12
    run("tiny", tmp_path / "killed", resume=True, overrides=overrides, progress=False)
    a, b = state.load(tmp_path / "whole"), state.load(tmp_path / "killed")
    for name, value in a["ema"].items():
        assert torch.equal(value, b["ema"][name]), name


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / state.CHECKPOINT).touch()
    with pytest.raises(KitError, match="--resume"):
        run("tiny", tmp_path, overrides=[*TINY, "train.stage=base"], progress=False)


def test_unknown_stage_is_named(tmp_path):
    with pytest.raises(KitError, match="did you mean 'base'"):
        run("tiny", tmp_path, overrides=[*TINY, "train.stage=bse"], progress=False)

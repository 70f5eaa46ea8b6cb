"""The one script for a GPU, its whole way gone on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert {row["status"] for row in content["rows"]} == {"ok"}, [
        (row["id"], row["reason"]) for row in content["rows"] if row["status"] != "ok"
    ]
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
    }
    assert "ceilings: fp32" in done.stdout
    assert "not run: none" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["-o", str(tmp_path / "r.json")]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert script.main(["-o", str(tmp_path / "r.json"), "--cpu-test", "--only", "nothing-like-it"]) == 2
    assert "no row matches 'nothing-like-it'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""What the README prints is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """The code between the fences after an HTML comment."""
    return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", README, re.S).group(1)


def test_a_users_own_network_is_sampled_as_printed():
    code = block("example: builder")
    assert len(code.strip().splitlines()) <= 12
    names: dict = {}
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    assert names["picture"].shape == (1, 3, 32, 32)
    assert torch.isfinite(names["picture"]).all()


@pytest.mark.slow
def test_the_benchmarkers_lines_run_as_printed(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block("example: benchmarker")], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "tiny.png").stat().st_size > 0
    assert (tmp_path / "runs" / "tiny" / "weights" / "base.safetensors").is_file()


def test_the_sampler_choosers_lines_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block("example: chooser"), "README.md", "exec", dont_inherit=True), names)
    assert len(list(tmp_path.glob("dpmpp_*.png"))) >= 4


def test_the_guidance_stack_runs_as_printed():
    names: dict = {}
    exec(compile(block("example: guidance"), "README.md", "exec", dont_inherit=True), names)
    assert names["picture"].shape == (2, 3, 32, 32)
    assert torch.isfinite(names["picture"]).all()


def test_the_list_of_parts_is_the_registrys(capsys):
    from imagen_kit.cli import main

    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in README, "run: python docs/update_readme.py"


def test_pictures_named_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path

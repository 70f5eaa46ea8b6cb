"""What ``generate`` chooses and says about how networks are run; what ``show`` prints of it."""

from __future__ import annotations

import pytest

from imagen_kit.performance import automatic

TINY = ("--recipe", "tiny")


def test_generate_says_on_one_line_what_it_chose(command, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "machine", lambda device: "cpu, 2 threads")
    code, out, err = command("generate", "a star", *TINY, "-o", tmp_path / "a.png", "--device", "cpu")
    assert code == 0
    assert out.strip() == str(tmp_path / "a.png")
    assert "cpu, 2 threads: base fp32 channels-last eager, sr fp32 channels-last eager\n" in err


def test_generate_in_a_precision_unless_the_recipe_says_another(command, tmp_path):
    change = "stages.sr.performance={dtype: fp32, memory_format: channels_last}"
    words = ("-o", tmp_path / "a.png", "--device", "cpu", "--dtype", "bf16", "--set", change)
    code, _, err = command("generate", "a star", *TINY, *words)
    assert code == 0
    assert "base bf16 eager, sr fp32 channels-last eager\n" in err


def test_compile_seconds_are_told(command, tmp_path, monkeypatch):
    import torch

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="eager", **options))
    change = "stages.sr.performance.compile=blocks"
    code, _, err = command("generate", "a star", *TINY, "-o", tmp_path / "a.png", "--set", change)
    assert code == 0
    assert "sr fp32 channels-last compiled-blocks" in err
    assert err.strip().endswith(" s of them compiling")


def test_what_cannot_be_had_is_one_line(command, tmp_path):
    words = ("-o", tmp_path / "a.png", "--device", "cpu", "--set", "stages.sr.performance.quantise=fp8")
    pytest.importorskip("torchao")
    code, out, err = command("generate", "a star", *TINY, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe tiny: stages.1.performance: quantise fp8 needs a GPU of compute")
    assert err.count("\n") == 1


def test_show_prints_how_stages_are_run(command):
    changes = (
        "stages.base.performance.dtype=bf16",
        "stages.base.performance.remember_text=false",
        "stages.sr.cache={name: deep_cache, every: 3}",
        "offload=model",
    )
    code, out, _ = command("show", "tiny", *(word for change in changes for word in ("--set", change)))
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert "run         dtype bf16, remember text false" in lines
    assert "cache       deep_cache (every=3)" in lines
    assert "offload       model" in lines
    assert sum(line.startswith("run ") for line in lines) == 1

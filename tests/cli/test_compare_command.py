"""``imagen-kit compare``: what it writes and says, and one plain line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest


@pytest.fixture
def compare(command):
    """Run ``imagen-kit compare``; (exit code, stdout, stderr)."""
    return partial(command, "compare")


@pytest.fixture
def refused(compare, monkeypatch):
    """Run a compare that must be refused before anything is drawn; the line it says."""

    def run(*words):
        monkeypatch.setattr("imagen_kit.pipeline.Pipeline._latents", lambda *a, **k: pytest.fail("it drew"))
        monkeypatch.setattr(
            "imagen_kit.evaluation.subjects.AnalyticSubject.draw", lambda *a, **k: pytest.fail("it drew")
        )
        code, out, err = compare(*words)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return run


def test_a_recipe_is_compared(compare, tmp_path):
    out = tmp_path / "c"
    words = ["tiny", "--samplers", "ddim, heun:spacing=trailing", "--steps", "2,1", "-n", 2, "-o", out]
    words += ["--guidance", "1,2", "--seeds", "0,5", "--reference", "dpmpp_3m@4", "--thumbnails", 1]
    code, said, _ = compare(*words, "--target", "psnr=5")
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["cells"]) == 2 * 2 * 2 * 2
    assert list(results["samplers"]) == ["ddim", "heun:spacing=trailing"]
    assert results["settings"]["subject"] == "tiny"
    assert results["settings"]["features"] is None  # two pictures say nothing of a distribution
    lines = said.splitlines()
    assert str(out / "report.html") in lines[0]
    assert [line.split(" at ")[0] for line in lines[1:]] == ["For PSNR to the converged picture (dB) ≥ 5"] * 2
    # Not a single cell is drawn again, and the same is said.
    before = (out / "results.json").stat().st_mtime_ns, results["cells"]
    assert compare(*words, "--target", "psnr=5")[1] == said
    assert json.loads((out / "results.json").read_text())["cells"] == before[1]


def test_an_analytic_problem_is_compared_and_redrawn(compare, tmp_path):
    out = tmp_path / "a"
    code, said, err = compare(
        *("analytic:gaussian", "--samplers", "ddim,heun", "--nfe", "4,9", "-n", 40, "-o", out),
        *("--schedule", "edm", "--spacing", "log_snr", "--data-num", 50),
    )
    assert code == 0
    assert "the cheapest is" in said.splitlines()[-1]
    results = json.loads((out / "results.json").read_text())
    assert [(c["sampler"], c["nfe"]) for c in results["cells"]] == [
        ("ddim", 4), ("ddim", 9), ("heun", 3), ("heun", 9),
    ]  # fmt: skip
    assert results["samplers"]["heun"]["options"]["spacing"] == "log_snr"
    assert results["settings"]["real"] == 50
    (out / "report.html").unlink()
    (out / "tradeoff.png").unlink()
    code, said, err = compare("--redraw", out, "--target", "energy=99")
    assert (code, err) == (0, "")
    assert said.splitlines()[-1].startswith("For energy distance to the data ≤ 99 the cheapest is ")
    assert sorted(file.name for file in out.iterdir()) == [
        "converged", "report.html", "results.json", "tradeoff.png",
    ]  # fmt: skip


def test_prompts_of_ones_own_are_not_judged(compare, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n二只狗\n", encoding="utf-8-sig")
    code, _, _ = compare(
        *("tiny", "--samplers", "ddim", "--steps", "1", "-n", 3, "--reference", "ddim@2"),
        *("--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "c"),
    )
    assert code == 0
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert "accuracy" not in results["cells"][0]
    assert results["references"][0]["captions"] == ["a cat", "二只狗", "a cat"]


MISTAKES = [
    ([], "compare needs a recipe"),
    (["tyni"], "did you mean 'tiny'"),
    (["tiny", "--samplers", "dimm"], "did you mean 'ddim'"),
    (["tiny", "--samplers", " , "], "--samplers is empty"),
    (["tiny", "--samplers", "ddim:etta=1"], "did you mean 'eta'"),
    (["tiny", "--samplers", "ddim:eta=x"], "must be a number"),
    (["tiny", "--caches", ""], "--caches is empty"),
    (["tiny", "--caches", "none,deep_cach"], "did you mean 'deep_cache'"),
    (["tiny", "--caches", "first_block:treshold=1"], "did you mean 'threshold'"),
    (["tiny", "--caches", "deep_cache:every=0"], "every must be a whole number of at least 1"),
    (["tiny", "--caches", "deep_cache:depth=9"], "cache depth 9: UNet can be cut at 1 to 4"),
    (["analytic:gmm2d", "--caches", "deep_cache"], "--caches is for recipes"),
    (["tiny", "--spacing", "karas"], "did you mean 'karras'"),
    (["tiny", "--steps", "5,x"], "--steps must be whole numbers"),
    (["tiny", "--steps", "0"], "--steps must be whole numbers"),
    (["tiny", "--nfe", "1.5"], "--nfe must be whole numbers"),
    (["tiny", "--steps", "5", "--nfe", "5"], "--steps or --nfe"),
    (["tiny", "--guidance", "1,much"], "--guidance must be finite numbers"),
    (["tiny", "--guidance", "inf"], "--guidance must be finite numbers"),
    (["tiny", "--seeds", "0,-1"], "--seeds must be whole numbers"),
    (["tiny", "--seed", "x"], "--seeds must be whole numbers"),
    (["tiny", "--seeds", "1,4294967296"], "--seeds must be at most 4294967295"),
    (["tiny", "--steps", "99999999999"], "steps must be at most 100,000"),
    (["tiny", "-n", "0"], "--num must be at least 1"),
    (["tiny", "-n", "few"], "'-n'"),
    (["tiny", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["tiny", "--thumbnails", "-1"], "--thumbnails must be at least 0"),
    (["tiny", "--data-num", "0"], "--data-num must be at least 1"),
    (["tiny", "--language", "fr"], "unknown language 'fr'"),
    (["tiny", "--split", "heldout"], "did you mean 'held_out'"),
    (["tiny", "--prompts", "/none.txt"], "cannot read /none.txt"),
    (["tiny", "--reference", "dpmpp_3m"], "SAMPLER@STEPS"),
    (["tiny", "--reference", "exact"], "is for analytic problems"),
    (["tiny", "--reference", "ddm@9"], "did you mean"),
    (["tiny", "--features", "jugde"], "did you mean 'judge'"),
    (["tiny", "--features", "timm:test_efficientnet@/none.pt"], "there is no weight file /none.pt"),
    (["tiny", "--features", "pixels", "-n", "3"], "at least 4 pictures"),
    (["tiny", "--lpips", "/none.pth"], "there is no file /none.pth"),
    (["tiny", "--features", "pixels", "--data", "folder:path=/none"], "does not exist"),
    (["tiny", "--target", "rmse=few"], "--target must be a number"),
    (["tiny", "--target", "rsme=1"], "did you mean 'rmse'"),
    (["tiny", "--device", "abacus"], "'abacus' is not there"),
    (["tiny", "--dtype", "fp31"], "did you mean 'fp32'"),
    (["tiny", "--set", "stages.0.shedule=flow"], "did you mean 'schedule'"),
    (["tiny", "--schedule", "edm"], "--schedule is for analytic problems"),
    (["analytic:gmm3d"], "did you mean 'gmm2d'"),
    (["analytic:gmm2d", "--schedule", "edn"], "did you mean 'edm'"),
    (["analytic:gmm2d", "--schedule", "flow:shift=x"], "must be a number"),
    (["analytic:gmm2d", "--guidance", "2"], "--guidance is for recipes"),
    (["analytic:gmm2d", "--features", "pixels"], "--features is for recipes"),
    (["analytic:gmm2d", "--samplers", "dimm"], "did you mean 'ddim'"),
    (["analytic:gmm2d", "--nfe", "9", "--samplers", "dpm_adaptive"], "tolerances"),
    (["analytic:gmm2d", "--target", "psnr=3"], "unknown quality 'psnr'"),
    (["analytic:gmm2d", "--steps", "2000", "--schedule", "linear"], "at most"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(refused, tmp_path, words, says):
    # One sampler and budget where the mistake is not in them: each is tried on the recipe.
    short = [] if "--samplers" in words else ["--samplers", "ddim"]
    short += [] if {"--steps", "--nfe"} & set(words) else ["--steps", "1"]
    line = refused(*words, *short, "-o", tmp_path / "c")
    assert says.lower() in line.lower()
    assert list(tmp_path.iterdir()) == []


def test_sampler_that_does_not_fit_the_schedule(refused, tmp_path):
    zero = "stages.0.schedule={name: linear, timesteps: 1000, zero_terminal_snr: true}"
    swap = ["--set", zero, "--set", "stages.0.prediction=v", "--samplers", "ddim,heun"]
    assert "'heun' does not fit" in refused("tiny", *swap, "-o", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_folders_that_cannot_be_used(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "c", "/proc/none/c"):
        assert "cannot write" in refused("tiny", "-o", bad)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot write" in refused("tiny", "-o", tmp_path / "closed" / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"format": 1}')
    assert "choose another folder" in refused("analytic:gmm2d", "-o", tmp_path / "other")
    assert "choose another folder" in refused("--redraw", tmp_path / "other")
    assert "there is no" in refused("--redraw", tmp_path / "none")
    assert "leave out 'samplers'" in refused("--redraw", tmp_path / "other", "--samplers", "ddim")
    assert "leave out 'target'" in refused("tiny", "--redraw", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "closed") == ["file", "other"]


OUTLINE = {"format": 2, "settings": {}, "cells": [], "samplers": {}, "references": [], "qualities": []}


@pytest.mark.parametrize(
    ("cells", "says"),
    [([], "holds no finished setting"), ([1], "is damaged"), ([{"steps": 3}], "is damaged")],
)
def test_results_that_cannot_be_drawn(refused, tmp_path, cells, says):
    (tmp_path / "results.json").write_text(json.dumps({**OUTLINE, "cells": cells}))
    assert says in refused("--redraw", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_changed_setting_is_named(compare, refused, tmp_path):
    words = ["analytic:points", "--samplers", "ddim", "--steps", "2", "-o", tmp_path]
    assert compare(*words, "-n", 9)[0] == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert "made with n = 9, not 8" in refused(*words, "-n", 8)
    assert "made with schedule = 'flow', not 'cosine'" in refused(*words, "-n", 9, "--schedule", "cosine")
    assert "'ddim' was made with spacing" in refused(*words, "-n", 9, "--spacing", "karras")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before

"""``imagen-kit show sampler``: the tableau in words, numbers and a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from imagen_kit import samplers, schedules
from imagen_kit.samplers.stability import stability


def test_the_tableau_is_printed(command):
    code, out, _ = command("show", "sampler", "sa_solver", "--steps", 6, "--schedule", "scaled_linear")
    assert code == 0
    schedule = schedules.create("scaled_linear")
    tableau = samplers.create("sa_solver").tableau(schedule, 6)
    assert f"6 network evaluations, order 2, stochastic ({tableau.noises} noise terms)" in out
    assert f"stability: {stability(tableau, schedule)}" in out
    assert all(f"  {row}" in out for row in tableau.rows)
    assert out.count("(ends step") == 6


def test_options_budget_and_picture(command, tmp_path):
    path = tmp_path / "heun.png"
    code, out, _ = command(
        "show", "sampler", "heun", "--nfe", 8, "--set", "final=sigma_min", "--set", "rho=3", "--plot", path
    )
    assert code == 0
    assert "4 steps on schedule flow: 8 network evaluations, order 2, deterministic" in out
    assert f"drawn to {path}" in out
    assert np.asarray(Image.open(path).convert("L")).std() > 10  # not a blank sheet


def test_aliases_are_shown(command):
    code, out, _ = command("show", "sampler", "DPM++ 2M Karras", "--steps", 2)
    assert code == 0
    assert "sampler dpmpp_2m: " in out
    assert "'karras'" in out
    assert "2 steps on schedule flow" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dpmpp_4m", "--steps", "3"], "unknown sampler 'dpmpp_4m'; did you mean 'dpmpp_"),
        (["ddim", "--steps", "0"], "steps must be a whole number of at least 1, not 0"),
        (["ddim", "--steps", "-2"], "steps must be a whole number of at least 1, not -2"),
        (["ddim", "--steps", "x"], "Invalid value for '--steps'"),
        (["ddim", "--steps", "1001", "--schedule", "linear"], "steps must be at most 1000"),
        (["ddim", "--steps", "3", "--nfe", "3"], "give nfe, or steps, or a grid"),
        (["ddim", "--steps", "3", "--schedule", "flaw"], "unknown schedule 'flaw'; did you mean 'flow'?"),
        (["ddim", "--steps", "3", "--set", "etaa=1"], "no option 'etaa'; did you mean 'eta'?"),
        (["ddim", "--steps", "3", "--set", "eta=high"], "sampler.eta: must be a number"),
        (["ddim", "--steps", "3", "--set", "eta=3"], "'eta' must be a number from 0 to 1, not 3"),
        (["ddim", "--set", "eta=1"], "--set changes recipes, and samplers shown with --steps or --nfe"),
        (["ddim", "--plot", "a.doc"], "a picture's file must end in .png"),
        (["ddim", "--plot", "no/where.png"], "cannot write no/where.png"),
        (["dpm_adaptive", "--steps", "3"], "has no tableau"),
    ],
)
def test_mistakes_are_one_line(command, words, says):
    code, out, err = command("show", "sampler", *words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("option", [["--nfe", "3"], ["--plot", "a.png"]])
def test_options_of_samplers_are_refused_elsewhere(command, option):
    for words in (["tiny"], ["guidance", "cfg"], ["recipe", "tiny"]):
        code, out, err = command("show", *words, *option)
        assert (code, out) == (2, "")
        assert f"{option[0]} goes with a sampler" in err

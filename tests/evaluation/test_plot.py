"""The plot says what it shows."""

from __future__ import annotations

import pytest

from imagen_kit.evaluation.plot import figure, tradeoff

QUALITIES = [
    {
        "key": "rmse",
        "label": "RMSE to the converged result (base, 32 px)",
        "better": "lower",
        "log": True,
        "paired": True,
    },
    {"key": "psnr", "label": "PSNR", "better": "higher", "log": False, "paired": True},
    {"key": "accuracy", "label": "share right", "better": "higher", "log": False, "paired": False},
]


def cell(name, steps, seed, scale):
    return {
        "sampler": name,
        "steps": steps,
        "seed": seed,
        "guidance": scale,
        "budget": {"steps": steps},
        "nfe": steps,
        "evaluations_per_picture": steps,
        "seconds_per_picture": 0.1,
        "memory": None,
        "n": 50,
        "accuracy": {"all": steps / 50},
        "rmse": (1 + seed) / steps**2,
        "psnr": 10.0,
    }


def results(names=("ddim", "euler_ancestral"), seeds=(0,), scales=(None,)):
    keys = [(n, s, seed, g) for n in names for s in (20, 5, 10) for seed in seeds for g in scales]
    return {
        "qualities": QUALITIES,
        "samplers": {name: {"stochastic": name != "ddim"} for name in names},
        "cells": [cell(*key) for key in keys],
        "references": [{"guidance": None, "seed": 0, "accuracy": {"all": 0.6}}],
        "settings": {
            "subject": "pocket",
            "n": 50,
            "split": "held_out",
            "language": "en",
            "reference": "heun@64",
        },
    }


def test_axes_are_labelled_logarithmic_and_hold_the_numbers():
    distance, right = figure(results()).axes
    for axes in (right, distance):
        assert axes.get_xscale() == "log"
        assert axes.get_xlabel() == "network evaluations"
        assert set(axes.get_xticks()) == {5, 10, 20}
    assert (distance.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert "RMSE" in distance.get_ylabel()
    assert "right" in right.get_ylabel()  # and not the PSNR, which is a distance to the same pictures
    lines = {line.get_label(): line for line in distance.get_lines()}
    assert list(lines) == ["ddim", "euler_ancestral", "Pareto front"]
    assert list(lines["ddim"].get_xdata()) == [5, 10, 20]  # in order, whatever order the cells came in
    assert list(lines["ddim"].get_ydata()) == pytest.approx([1 / 25, 1 / 100, 1 / 400])
    assert (lines["ddim"].get_linestyle(), lines["euler_ancestral"].get_linestyle()) == ("-", ":")
    assert list(lines["Pareto front"].get_xdata()) == [5, 10, 20]


def test_bands_hold_seeds_and_guidance():
    (distance, _) = figure(results(seeds=(0, 1), scales=(1.0, 3.0))).axes
    band = distance.collections[0].get_paths()[0].vertices
    at_five = band[band[:, 0] == 5][:, 1]
    assert (at_five.min(), at_five.max()) == pytest.approx((1 / 25, 2 / 25))
    assert distance.get_lines()[0].get_ydata()[0] == pytest.approx(1.5 / 25)


def test_titles_tell_the_settings():
    title = figure(results(seeds=(0, 1), scales=(None, 3.0))).get_suptitle()
    for part in ("pocket: 50 held_out captions (en)", "heun@64", "guidance own, 3", "2 seeds"):
        assert part in title


def test_nothing_measured_is_an_empty_plot():
    empty = {**results(), "cells": []}
    assert len(figure(empty).axes) == 1


def test_file(tmp_path):
    tradeoff(results([f"sampler_{i}" for i in range(14)]), tmp_path / "tradeoff.png")
    assert (tmp_path / "tradeoff.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 1

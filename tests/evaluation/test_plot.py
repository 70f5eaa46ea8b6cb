"""The plot says what it shows."""

from __future__ import annotations

from imagen_kit.evaluation.plot import figure, tradeoff


def results(names=("ddim", "euler_ancestral")):
    def cell(name, steps):
        return {
            "sampler": name,
            "steps": steps,
            "nfe": steps,
            "stochastic": name != "ddim",
            "accuracy": {"all": steps / 40},
            "interval": [steps / 50, steps / 30],
            "rmse_first": 1 / steps**2,
        }

    return {
        "cells": [cell(name, steps) for name in names for steps in (20, 5, 10)],
        "reference": {"accuracy": {"all": 0.6}},
        "settings": {
            "recipe": "pocket",
            "n": 50,
            "split": "held_out",
            "language": "en",
            "seed": 0,
            "reference": ["heun", 64],
        },
    }


def test_axes_are_labelled_logarithmic_and_hold_the_numbers():
    right, distance = figure(results()).axes
    for axes in (right, distance):
        assert axes.get_xscale() == "log"
        assert "network evaluations" in axes.get_xlabel()
        assert set(axes.get_xticks()) == {5, 10, 20}
    assert distance.get_yscale() == "log"
    assert "right" in right.get_ylabel()
    assert "RMSE" in distance.get_ylabel()
    lines = {line.get_label(): line for line in distance.get_lines()}
    assert list(lines) == ["ddim", "euler_ancestral"]
    assert list(lines["ddim"].get_xdata()) == [5, 10, 20]  # in order, whatever order the cells came in
    assert list(lines["ddim"].get_ydata()) == [1 / 25, 1 / 100, 1 / 400]
    assert (lines["ddim"].get_linestyle(), lines["euler_ancestral"].get_linestyle()) == ("-", ":")


def test_file(tmp_path):
    tradeoff(results(), tmp_path / "tradeoff.png")
    assert (tmp_path / "tradeoff.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 1

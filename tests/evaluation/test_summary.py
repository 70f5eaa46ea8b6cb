"""Means, fronts and answers against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagen_kit.errors import KitError
from imagen_kit.evaluation import summary

RMSE = {"key": "rmse", "label": "RMSE", "better": "lower", "log": True, "paired": True}
ACCURACY = {"key": "accuracy", "label": "share right", "better": "higher", "log": False, "paired": False}


def cell(sampler, nfe, rmse, right=0, seed=0, guidance=None, seconds=1.0):
    return {
        "sampler": sampler,
        "steps": nfe,
        "guidance": guidance,
        "seed": seed,
        "budget": {"steps": nfe},
        "nfe": nfe,
        "evaluations_per_picture": 2.0 * nfe,
        "seconds_per_picture": seconds,
        "memory": None,
        "rmse": rmse,
        "n": 10,
        "accuracy": {"all": right / 10},
    }


def results(*cells):
    names = dict.fromkeys(c["sampler"] for c in cells)
    return {
        "qualities": [RMSE, ACCURACY],
        "samplers": {name: {"stochastic": False} for name in names},
        "cells": list(cells),
    }


def test_seeds_are_averaged_and_their_spread_kept():
    found = summary.points(
        results(
            cell("b", 10, 0.2, right=4, seed=0),
            cell("b", 10, 0.4, right=8, seed=1),
            cell("b", 5, 0.9),
            cell("a", 5, 0.5, guidance=2.0),
            {**cell("a", 10, 0.5, guidance=2.0), "failed": "not finite"},
        )
    )
    assert [(p["sampler"], p["steps"], p["guidance"], p["seeds"]) for p in found] == [
        ("b", 5, None, 1),
        ("b", 10, None, 2),
        ("a", 5, 2.0, 1),
    ]
    ten = found[1]
    assert ten["rmse"] == pytest.approx(0.3)
    assert ten["spread"]["rmse"] == [0.2, 0.4]
    assert ten["accuracy"] == pytest.approx(0.6)
    low, high = ten["spread"]["accuracy"]  # Wilson's interval of 12 of 20: 0.387 to 0.781
    assert (low, high) == pytest.approx((0.3866, 0.7812), abs=1e-4)
    assert ten["memory"] is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=12),
    st.sampled_from(["lower", "higher"]),
)
def test_the_front_is_what_nothing_beats(pairs, better):
    points = [{"nfe": x, "q": y, "i": i} for i, (x, y) in enumerate(pairs)]
    sign = 1 if better == "lower" else -1

    def beaten(p):
        return any(
            other["nfe"] <= p["nfe"]
            and sign * other["q"] <= sign * p["q"]
            and (other["nfe"], other["q"]) != (p["nfe"], p["q"])
            for other in points
        )

    front = summary.pareto(points, "nfe", "q", better)
    expected = {(p["nfe"], p["q"]) for p in points if not beaten(p)}
    assert [(p["nfe"], p["q"]) for p in front] == sorted(expected)  # each once, cheapest first
    missing = [*points, {"nfe": 1, "q": None}, {"nfe": None, "q": 0}]
    assert summary.pareto(missing, "nfe", "q", better) == front


def test_the_cheapest_that_is_good_enough():
    found = results(
        cell("slow", 9, 0.01, right=9),
        cell("fast", 5, 0.04, right=2, seconds=2.0),
        cell("fast", 10, 0.02, right=8),
        cell("other", 5, 0.03, right=1),
    )
    (answer,) = summary.answers(found, ["0.045"])
    # Of equally many evaluations the better one, although it is named later.
    assert (answer["sampler"], answer["steps"]) == ("other", 5)
    assert answer["text"] == (
        "For RMSE ≤ 0.045 the cheapest is other with 5 steps: 5 evaluations, 1 s a picture (rmse 0.03); "
        "then fast with 5 steps, 5 evaluations."
    )
    strict, none, share = summary.answers(found, ["rmse=0.01", "rmse<=0.001", "accuracy>=0.8"])
    assert strict["text"].endswith("(rmse 0.01).")  # nothing else is as good
    assert none["sampler"] is None
    assert none["text"] == "For RMSE ≤ 0.001 nothing measured is good enough; the best is 0.01."
    assert share["text"].startswith("For share right ≥ 0.8 the cheapest is slow with 9 steps")


def test_every_guidance_scale_has_its_answer():
    found = results(cell("a", 5, 0.1, guidance=1.0), cell("a", 5, 0.5, guidance=3.0), cell("a", 5, 0.6))
    texts = [answer["text"] for answer in summary.answers(found, ["rmse=0.2"])]
    assert [text.split(" the cheapest")[0].split(" nothing")[0] for text in texts] == [
        "For RMSE ≤ 0.2 at the recipe's guidance",
        "For RMSE ≤ 0.2 at guidance 1",
        "For RMSE ≤ 0.2 at guidance 3",
    ]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ([0.012], 0.02),
        ([0.02], 0.02),
        ([0.021, 0.9], 0.05),  # half of them reach it
        ([0.001, 0.003, 0.9], 0.005),
        ([7e-7], 1e-6),
        ([3.0], 5.0),
        ([0.0], None),
        ([], None),
    ],
)
def test_a_target_chosen_by_itself_is_round_and_reached_by_half(best, expected):
    points = [{"sampler": str(i), "rmse": v, "nfe": 5} for i, v in enumerate(best)]
    points += [{"sampler": p["sampler"], "rmse": 99.0, "nfe": 2} for p in points]  # a worse budget of each
    assert summary.default_target(points, RMSE) == expected


def test_a_target_of_what_should_be_high():
    points = [{"sampler": str(i), "psnr": v, "nfe": 5} for i, v in enumerate((31.0, 27.0, 12.0))]
    # 27 dB is what half of them reach; 20 is the nearest round number that it reaches too
    assert summary.default_target(points, {**RMSE, "key": "psnr", "better": "higher"}) == 20


@pytest.mark.parametrize("text", ["rmse=", "few", "rmse=nan", "inf", "rsme=1"])
def test_bad_targets(text):
    with pytest.raises(KitError, match="--target"):
        summary.parse_targets([text], [RMSE, ACCURACY])

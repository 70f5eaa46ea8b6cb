"""Step caches in a comparison: each a line of its own, with what it saves and what it costs in error."""

from __future__ import annotations

import json

import pytest

from imagen_kit.cli import main
from imagen_kit.evaluation import compare, report, spec, summary
from imagen_kit.evaluation.drawing import draw, fingerprint
from imagen_kit.evaluation.plot import figure
from imagen_kit.recipe import Recipe

OWN = "stages.0.cache={name: interval, every: 100}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Results of ``tiny`` with one sampler, with and without caches, and the folder."""
    out = tmp_path_factory.mktemp("cached")
    caches = "none,deep_cache:every=2,interval:every=1,interval:every=4"
    words = [
        "tiny",
        "--samplers",
        "ddim",
        "--caches",
        caches,
        "--steps",
        "4,8",
        "-n",
        "2",
        "--features",
        "none",
    ]
    assert main(["compare", *words, "--reference", "ddim@8", "-o", str(out)]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8")), out


def cell(results: dict, label: str, steps: int = 8) -> dict:
    return next(c for c in results["cells"] if (c["sampler"], c["steps"]) == (label, steps))


def test_every_sampler_is_drawn_with_every_cache(compared):
    results, _ = compared
    labels = ["ddim", "ddim + deep_cache:every=2", "ddim + interval:every=1", "ddim + interval:every=4"]
    assert list(results["samplers"]) == labels
    options = results["samplers"][labels[1]]["options"]
    assert (options["cache"], options["cache.every"], options["cache.depth"]) == ("DeepCache", 2, 1)
    assert "cache" not in results["samplers"]["ddim"]["options"]
    assert {c["nfe"] for c in results["cells"]} == {4, 8}


def test_the_work_is_what_the_blocks_computed_are_worth(compared):
    """7 units lie in tiny's base: 4 on the ways down and up and in the middle but the last one, at depth 1."""
    results, _ = compared
    network = Recipe.load("tiny").build().stages[0].denoiser
    share = network.shares[0]
    assert cell(results, "ddim")["work"] == 8
    assert cell(results, "ddim + interval:every=1")["work"] == 8
    assert cell(results, "ddim + deep_cache:every=2")["work"] == pytest.approx(8 - 4 * share)
    assert cell(results, "ddim + interval:every=4")["work"] == pytest.approx(8 - 6 * share)


def test_the_error_is_to_the_picture_without_a_cache(compared):
    results, _ = compared
    errors = [
        cell(results, label)["rmse"]
        for label in ("ddim", "ddim + interval:every=1", "ddim + deep_cache:every=2")
    ]
    assert errors[:2] == [0.0, 0.0]  # the reference itself, bit for bit
    assert errors[2] > 0


def test_report_and_sentences_count_the_work(compared):
    results, folder = compared
    shown = report.data(results)
    assert list(shown["costs"])[:2] == ["nfe", "work"]
    points = {(p["sampler"], p["steps"]): p for p in shown["points"]}
    assert points["ddim", 8]["saved"] == 0
    saved = points["ddim + interval:every=4", 8]["saved"]
    assert saved == pytest.approx(1 - cell(results, "ddim + interval:every=4")["work"] / 8)
    assert summary.foremost_cost(shown["points"]) == "work"
    (answer,) = compare.redraw(folder, ["rmse=1000"])["answers"]  # anything is good enough
    assert answer["sampler"] == "ddim + interval:every=4"
    assert (
        f"4 evaluations with the work of {points['ddim + interval:every=4', 4]['work']:.3g}" in answer["text"]
    )
    assert figure(results).axes[0].get_xlabel() == "network evaluations' worth of work"


def test_without_caches_there_is_no_such_column(compared):
    results, _ = compared
    plain = {**results, "cells": [c for c in results["cells"] if c["sampler"] == "ddim"]}
    assert "work" not in report.data(plain)["costs"]
    older = {**plain, "cells": [{k: v for k, v in c.items() if k != "work"} for c in plain["cells"]]}
    assert report.data(older)["costs"].keys() == report.data(plain)["costs"].keys()
    assert summary.foremost_cost(summary.points(older)) == "nfe"
    assert "with the work" not in summary.answers(older, ["rmse=1000"])[0]["text"]


def test_a_recipe_with_a_cache_of_its_own(tmp_path):
    """Its reference is drawn without; ``none`` is told apart from the recipe's own, which is what is drawn unasked."""
    words = ["tiny", "--set", OWN, "--samplers", "ddim", "--steps", "4", "-n", "2", "--reference", "ddim@4"]
    assert main(["compare", *words, "-o", str(tmp_path)]) == 0
    assert main(["compare", *words, "--caches", "none", "-o", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["samplers"]) == ["ddim", "ddim + none"]
    own, none = (cell(results, label, 4) for label in results["samplers"])
    assert none["rmse"] == 0 < own["rmse"]
    assert own["work"] < none["work"] == 4


def test_drawing_leaves_the_pipeline_as_it_was():
    pipeline = Recipe.load("tiny", [OWN]).build()
    sampler = pipeline.stages[0].sampler
    stages = list(pipeline.stages)
    cached, plain, other = (
        draw(pipeline, ["a"], [0], sampler, 4, **settings).saved
        for settings in ({}, {"cache": None}, {"cache": spec.create("cache", "interval:every=2")})
    )
    assert pipeline.stages == stages
    assert cached > other > plain == 0.0


def test_a_cache_of_its_own_makes_another_model():
    with_cache, without = (Recipe.load("tiny", words).build() for words in ([OWN], []))
    assert fingerprint(with_cache) != fingerprint(without)

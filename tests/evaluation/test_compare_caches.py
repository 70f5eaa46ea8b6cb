"""Step caches in a comparison: each a line of its own, with what it saves and what it costs in error."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch

from imagen_kit import recipe
from imagen_kit.cli import main
from imagen_kit.evaluation import compare, report, spec, summary
from imagen_kit.evaluation.drawing import draw, fingerprint
from imagen_kit.evaluation.plot import figure
from imagen_kit.evaluation.subjects import RecipeSubject
from imagen_kit.pipeline import Pipeline

OWN = "stages.0.cache={name: interval, every: 100}"


def built(*words: str) -> Pipeline:
    """The recipe ``tiny`` with random weights everywhere: a fresh network answers zero, whatever its blocks say."""
    pipeline = recipe.load("tiny", words).build()
    generator = torch.Generator().manual_seed(0)
    for stage in pipeline.stages:
        for parameter in stage.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Results of one sampler with and without caches, and the folder."""
    out, what = tmp_path_factory.mktemp("cached"), RecipeSubject(built(), name="tiny", n=2)
    caches = ["none", "deep_cache:every=2", "interval:every=1", "interval:every=4"]
    entries = spec.with_caches(spec.make_entries(["dpmpp_2m"], what.keep()), caches)
    return compare.run(what, entries, [4, 8], out, reference="dpmpp_2m@8"), out


def cell(results: dict, label: str, steps: int = 8) -> dict:
    return next(c for c in results["cells"] if (c["sampler"], c["steps"]) == (label, steps))


def test_every_sampler_is_drawn_with_every_cache(compared):
    results, _ = compared
    labels = [
        "dpmpp_2m",
        "dpmpp_2m + deep_cache:every=2",
        "dpmpp_2m + interval:every=1",
        "dpmpp_2m + interval:every=4",
    ]
    assert list(results["samplers"]) == labels
    options = results["samplers"][labels[1]]["options"]
    assert (options["cache"], options["cache.every"], options["cache.depth"]) == ("DeepCache", 2, 1)
    assert "cache" not in results["samplers"]["dpmpp_2m"]["options"]
    assert {c["nfe"] for c in results["cells"]} == {4, 8}


def test_the_work_is_what_the_blocks_computed_are_worth(compared):
    results, _ = compared
    share = 6 / 7  # units of tiny's base: two down, one in the middle, four up, the last of them outside
    assert cell(results, "dpmpp_2m")["work"] == 8
    assert cell(results, "dpmpp_2m + interval:every=1")["work"] == 8
    assert cell(results, "dpmpp_2m + deep_cache:every=2")["work"] == pytest.approx(8 - 4 * share)
    assert cell(results, "dpmpp_2m + interval:every=4")["work"] == pytest.approx(8 - 6 * share)


def test_the_error_is_to_the_picture_without_a_cache(compared):
    results, _ = compared
    errors = [
        cell(results, label)["rmse"]
        for label in ("dpmpp_2m", "dpmpp_2m + interval:every=1", "dpmpp_2m + deep_cache:every=2")
    ]
    assert errors[:2] == [0.0, 0.0]  # the reference itself, bit for bit
    assert errors[2] > 0


def test_report_and_sentences_count_the_work(compared):
    results, folder = compared
    shown = report.data(results)
    assert list(shown["costs"])[:2] == ["nfe", "work"]
    points = {(p["sampler"], p["steps"]): p for p in shown["points"]}
    assert points["dpmpp_2m", 8]["saved"] == 0
    saved = points["dpmpp_2m + interval:every=4", 8]["saved"]
    assert saved == pytest.approx(1 - cell(results, "dpmpp_2m + interval:every=4")["work"] / 8)
    assert summary.foremost_cost(shown["points"]) == "work"
    (answer,) = compare.redraw(folder, ["rmse=1000"])["answers"]  # anything is good enough
    assert answer["sampler"] == "dpmpp_2m + interval:every=4"
    assert (
        f"4 evaluations with the work of {points['dpmpp_2m + interval:every=4', 4]['work']:.3g}"
        in answer["text"]
    )
    assert figure(results).axes[0].get_xlabel() == "network evaluations' worth of work"


def test_without_caches_there_is_no_such_column(compared):
    results, _ = compared
    plain = {**results, "cells": [c for c in results["cells"] if c["sampler"] == "dpmpp_2m"]}
    assert "work" not in report.data(plain)["costs"]
    older = {**plain, "cells": [{k: v for k, v in c.items() if k != "work"} for c in plain["cells"]]}
    assert report.data(older)["costs"].keys() == report.data(plain)["costs"].keys()
    assert summary.foremost_cost(summary.points(older)) == "nfe"
    assert "with the work" not in summary.answers(older, ["rmse=1000"])[0]["text"]


def test_a_recipe_with_a_cache_of_its_own(tmp_path):
    """``none`` is told apart from the recipe's own, which is what is drawn unasked."""
    words = ["tiny", "--set", OWN, "--samplers", "ddim", "--steps", "4", "-n", "2", "--reference", "ddim@4"]
    assert main(["compare", *words, "-o", str(tmp_path)]) == 0
    assert main(["compare", *words, "--caches", "none,interval", "-o", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["samplers"]) == ["ddim", "ddim + none", "ddim + interval"]
    own, none, interval = (cell(results, label, 4)["work"] for label in results["samplers"])
    assert own < interval < none == 4


def test_the_converged_result_has_no_cache():
    """Of a recipe that names one too: without it the very sampler of the reference has no error."""
    what = RecipeSubject(built(OWN), name="tiny", n=2)
    entries = spec.with_caches(spec.make_entries(["dpmpp_2m"], what.keep()), ["none"], own=True)
    entries += spec.make_entries(["dpmpp_2m"], what.keep())
    with tempfile.TemporaryDirectory() as out:
        results = compare.run(what, entries, [4], out, reference="dpmpp_2m@4")
    assert cell(results, "dpmpp_2m + none", 4)["rmse"] == 0 < cell(results, "dpmpp_2m", 4)["rmse"]


def test_drawing_leaves_the_pipeline_as_it_was():
    pipeline = built(OWN)
    sampler = pipeline.stages[0].sampler
    stages = list(pipeline.stages)
    cached, plain, other = (
        draw(pipeline, ["a"], [0], sampler, 4, **settings).saved
        for settings in ({}, {"cache": None}, {"cache": spec.create("cache", "interval:every=2")})
    )
    assert pipeline.stages == stages
    assert cached > other > plain == 0.0


def test_a_cache_of_its_own_makes_another_model():
    with_cache, without = (built(*words) for words in ([OWN], []))
    assert fingerprint(with_cache) != fingerprint(without)

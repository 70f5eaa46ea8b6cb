"""Accuracy of pipelines whose every fault is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from imagen_kit.data.pocket import SceneBatch, is_held_out, parse, render
from imagen_kit.errors import KitError
from imagen_kit.evaluation.pocket import draw_scenes, evaluate, wilson


class Painter:
    """Stands in for a pipeline; draws captions perfectly, but for every ``miss``-th picture, left blank."""

    device = torch.device("cpu")

    def __init__(self, miss: int = 0, only: str = ""):
        self.miss, self.only, self.calls = miss, only, []

    def __call__(self, prompts, *, seed, **settings):
        self.calls.append((prompts, seed, settings))
        scenes = [parse(prompt) for prompt in prompts]
        pictures = render(SceneBatch.of(scenes), 48, torch.Generator().manual_seed(seed[0])) / 2 + 0.5
        if self.miss and self.only in prompts[0]:
            pictures[:: self.miss] = 0.5
        return SimpleNamespace(tensor=pictures)


def test_perfect_and_faulty_painters():
    report = evaluate(Painter(), n=40)["languages"]
    assert [report[lang]["accuracy"]["all"] for lang in ("en", "zh")] == [1.0, 1.0]
    assert report["en"]["wrong"] == []
    report = evaluate(Painter(miss=4, only="background"), n=40)["languages"]
    assert (
        report["en"]["accuracy"]["all"] == 0.75
    )  # every fourth of 40 blank, in the captions that say "background"
    assert report["zh"]["accuracy"]["all"] == 1.0
    assert len(report["en"]["wrong"]) == 10
    assert report["en"]["wrong"][1]["seed"] == 4
    assert "count" in report["en"]["wrong"][1]["wrong"]
    low, high = report["en"]["interval"]
    assert low < 0.75 < high


def test_parts_add_up():
    report = evaluate(Painter(miss=3), n=30, languages=("en",), split="all", seed=5)["languages"]["en"]
    one, two = report["one_object"], report["two_objects"]
    assert one["n"] + two["n"] == report["n"] == 30
    assert one["n"] * one["all"] + two["n"] * two["all"] == pytest.approx(20)


def test_same_scenes_and_seeds_in_every_language_and_the_split_holds():
    painter = Painter()
    evaluate(painter, n=12, seed=3, batch_size=5, sampler="ddim", steps=7, guidance=2.0, progress=False)
    (english, seeds, settings), (chinese, more_seeds, _) = painter.calls
    assert (
        [parse(text) for text in english]
        == [parse(text) for text in chinese]
        == draw_scenes(12, "held_out", 3)
    )
    assert all(is_held_out(parse(text)) for text in english)
    assert seeds == more_seeds == list(range(3, 15))
    assert settings == {"sampler": "ddim", "steps": 7, "guidance": 2.0, "batch_size": 5, "progress": False}


def test_wilson_against_the_textbook():
    # 8 of 10 at 95 %: Wilson's interval is 0.4902 to 0.9433 (e.g. Agresti & Coull 1998's formula by hand)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 0}, "at least 1"),
        ({"n": True}, "whole number"),
        ({"languages": ("fr",)}, "unknown language 'fr'"),
        ({"languages": ()}, "no language"),
        ({"split": "heldout"}, "did you mean 'held_out'"),
    ],
)
def test_bad_arguments(arguments, says):
    painter = Painter()
    with pytest.raises(KitError, match=says):
        evaluate(painter, **arguments)
    assert painter.calls == []

"""Captions, their inverse, and which scenes are drawn from which split."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagen_kit.data.pocket import (
    HELD_OUT,
    Obj,
    Scene,
    SceneBatch,
    caption,
    is_held_out,
    parse,
    sample_batch,
    sample_scenes,
)
from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES
from imagen_kit.errors import KitError

PAIR = Scene((Obj("large", "red", "star"), Obj("small", "blue", "ring")), "gray", "above")
SINGLE = Scene((Obj("small", "pink", "heart"),), "white")

things = st.builds(Obj, st.sampled_from(list(SIZES)), st.sampled_from(list(COLORS)), st.sampled_from(SHAPES))
grounds = st.sampled_from(list(BACKGROUNDS))
scenes = st.one_of(
    st.builds(lambda thing, ground: Scene((thing,), ground), things, grounds),
    st.builds(lambda a, b, g, r: Scene((a, b), g, r), things, things, grounds, st.sampled_from(RELATIONS)),
)


def test_captions_as_the_domain_words_them():
    assert caption(PAIR) == "a large red star above a small blue ring on a gray background"
    assert caption(SINGLE) == "a small pink heart on a white background"
    assert caption(PAIR, "zh") == "灰色背景上，一个大红色星形在一个小蓝色圆环的上方"
    assert caption(SINGLE, "zh") == "白色背景上的一个小粉色心形"


@settings(max_examples=200, deadline=None)
@given(scene=scenes, language=st.sampled_from(["en", "zh"]))
def test_parse_is_the_inverse_of_caption(scene, language):
    assert parse(caption(scene, language)) == scene
    assert parse(f"  {caption(scene, language)}\n") == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red star",
        "a large red star on a green background",
        "a huge red star on a gray background",
        "a large red star above on a gray background",
        "a large red star under a small blue ring on a gray background",
        "a large red star on a gray background and more",
        "灰色背景上的一个大红色",
        "灰色背景上，一个大红色星形",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(KitError, match="no caption of the pocket world"):
        parse(text)


def test_unknown_language_and_split():
    with pytest.raises(KitError, match="unknown caption language 'fr'"):
        caption(SINGLE, "fr")
    with pytest.raises(KitError, match="unknown split 'test'"):
        sample_batch(1, split="test")


def test_a_tenth_of_the_combinations_is_held_out_and_every_word_is_trained_on():
    total = len(SIZES) * len(COLORS) * len(SHAPES)
    assert 0.08 <= len(HELD_OUT) / total <= 0.12
    assert all(o.size in SIZES and o.color in COLORS and o.shape in SHAPES for o in HELD_OUT)
    for attribute, words in (("size", SIZES), ("color", COLORS), ("shape", SHAPES)):
        gone = Counter(getattr(o, attribute) for o in HELD_OUT)
        assert max(gone.values()) <= 0.25 * total / len(
            words
        )  # at least three quarters of each word's remain


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_splits(split):
    drawn = sample_scenes(1500, torch.Generator().manual_seed(0), split)
    assert len(drawn) == 1500
    held = [is_held_out(scene) for scene in drawn]
    assert held == [any(o in HELD_OUT for o in scene.objects) for scene in drawn]
    assert all(held) if split == "held_out" else any(held) == (split == "all")
    seen = Counter(len(scene.objects) for scene in drawn)
    assert seen.keys() == {1, 2}
    for scene in drawn:
        assert (scene.relation is None) == (len(scene.objects) == 1)
        assert len({(o.color, o.shape) for o in scene.objects}) == len(scene.objects)
    words = Counter(word for s in drawn for o in s.objects for word in (o.size, o.color, o.shape))
    assert words.keys() == {*SIZES, *COLORS, *SHAPES}
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    assert {s.relation for s in drawn} == {None, *RELATIONS}


def test_pair_fraction():
    for fraction in (0.0, 1.0):
        drawn = sample_batch(200, torch.Generator().manual_seed(1), "all", pair_fraction=fraction)
        assert (drawn.relation >= 0).double().mean() == fraction
    drawn = sample_batch(4000, torch.Generator().manual_seed(1), "all", pair_fraction=0.75)
    # same colour and shape strikes out 1 pair in 64; three standard deviations of 4000 draws are 0.02
    assert (drawn.relation >= 0).double().mean() == pytest.approx(0.747, abs=0.02)


def test_the_same_generator_gives_the_same_scenes():
    first, again, other = (sample_scenes(50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_batch_of_scenes_and_back():
    drawn = sample_scenes(64, torch.Generator().manual_seed(2), "all")
    batch = SceneBatch.of(drawn)
    assert len(batch) == 64
    assert batch.scenes() == drawn
    assert batch[10:20].scenes() == drawn[10:20]
    assert batch[torch.tensor([5, 1])].scenes() == [drawn[5], drawn[1]]

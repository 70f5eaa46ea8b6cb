"""The rows that a recipe comes to."""

from __future__ import annotations

import pytest

from imagen_kit import recipe as recipes
from imagen_kit.bench import engine
from imagen_kit.bench.recipes import cases


@pytest.mark.parametrize("name", ["tiny", "pocket-imagen", "sd15", "deepfloyd-if", "dit-xl-2-256"])
def test_a_row_for_the_whole_and_for_every_part(name):
    found, left_out = cases(name, weights="random", dtype="bf16")
    checked = recipes.load(name)
    engine.validate(found)
    kinds = [case.kind for case in found]
    assert kinds.count("recipe") == 2
    assert kinds.count("denoiser") == len(checked.stages)
    latent = [stage for stage in checked.stages if stage.codec.name != "pixel"]
    assert kinds.count("codec") == len(latent)
    encoders = 0 if checked.spec.labels else 1
    assert kinds.count("text_encoder") + len(left_out) >= encoders
    whole = next(case for case in found if case.kind == "recipe")
    assert whole.options == {"weights": "random", "dtype": "bf16", "batch": 1}


def test_a_denoiser_is_wired_and_of_the_size_of_its_latents():
    found, _ = cases("sd15")
    unet = next(case for case in found if case.kind == "denoiser")
    assert unet.name == "sd15_unet"
    assert unet.options["network"]["context_dim"] == 768
    assert (unet.options["resolution"], unet.options["batch"], unet.options["tokens"]) == (64, 2, 77)


def test_changes_reach_the_parts():
    found, _ = cases("tiny", changes=["stages.0.guidance=[]"])
    assert next(case for case in found if case.kind == "denoiser").options["batch"] == 1
    assert found[0].options["set"] == ["stages.0.guidance=[]"]

"""Every part swaps by one word: all pairs of parts train a step and draw a picture; every sampler draws."""

from __future__ import annotations

import itertools

import pytest
import torch
import yaml

from imagen_kit import recipe, samplers, training
from imagen_kit.weights import read_safetensors

PARTS = {
    "text_encoder": {
        "t5": {"name": "t5", "weights": "random", "size": "tiny"},
        "clip": {"name": "clip", "weights": "random", "size": "tiny"},
        "open_clip": {"name": "open_clip", "weights": "random", "size": "tiny"},
    },
    "denoiser": {
        "unet": {"name": "unet", "levels": [{"channels": 32, "blocks": 1, "attention": True}]},
        "dit": {"name": "dit", "width": 32, "depth": 1, "heads": 2},
    },
    "schedule": {"cosine": "cosine", "flow": "flow"},
    "sampler": {"ddim": "ddim", "dpmpp_2m": "dpmpp_2m"},
}
TRAIN = {"steps": 1, "batch_size": 2, "precision": "fp32", "ema": 0.0}


def all_pairs(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few combinations that together hold every pair of choices of every two kinds, found greedily."""
    kinds = list(choices)
    every = [dict(zip(kinds, words, strict=True)) for words in itertools.product(*choices.values())]

    def pairs(combination):
        return set(itertools.combinations(combination.items(), 2))

    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda combination: len(pairs(combination) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CHOICES = {kind: list(parts) for kind, parts in PARTS.items()}
COMBINATIONS = all_pairs(CHOICES)


def test_the_combinations_hold_every_pair():
    for (kind_a, a), (kind_b, b) in itertools.combinations(CHOICES.items(), 2):
        for pair in itertools.product(a, b):
            assert any((c[kind_a], c[kind_b]) == pair for c in COMBINATIONS), pair


def write(path, combination):
    stage = {
        "name": "base",
        "size": 8,
        "prediction": "v",
        "guidance": [{"name": "cfg", "scale": 2.0}],
        "denoiser": PARTS["denoiser"][combination["denoiser"]],
        "schedule": PARTS["schedule"][combination["schedule"]],
        "sampler": {"name": PARTS["sampler"][combination["sampler"]], "steps": 2},
    }
    encoder = PARTS["text_encoder"][combination["text_encoder"]]
    path.write_text(
        yaml.safe_dump({"name": "swap", "text_encoder": encoder, "stages": [stage], "train": TRAIN})
    )
    return path


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(c.values()))
def test_swapped_parts_train_a_step_and_draw(tmp_path, combination):
    path = write(tmp_path / "swap.yaml", combination)
    losses = training.run(path, tmp_path / "run", progress=False)
    assert 0 < losses["loss"] < 100
    trained = tmp_path / "run" / "weights" / "base.safetensors"
    pipeline = recipe.load(path, [f"stages.0.weights={trained}"]).build()
    fresh = recipe.load(path).build_stage_denoiser(0, pipeline.text_encoder)
    assert read_safetensors(trained).keys() == fresh.state_dict().keys()
    pictures = pipeline("a small red star on a white background", num=2).tensor
    assert pictures.shape == (2, 3, 8, 8)
    assert torch.isfinite(pictures).all()
    assert not torch.equal(pictures[0], pictures[1])


def test_text_arrives_through_every_encoder_and_denoiser(tmp_path):
    """Two prompts give two pictures, whichever encoder and denoiser stand between."""
    for encoder, denoiser in itertools.product(CHOICES["text_encoder"], CHOICES["denoiser"]):
        words = {"text_encoder": encoder, "denoiser": denoiser, "schedule": "flow", "sampler": "ddim"}
        pipeline = recipe.load(write(tmp_path / "swap.yaml", words)).build()
        with torch.no_grad():
            for parameter in pipeline.stages[0].denoiser.parameters():  # untrained last layers are zero
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
        red, blue = pipeline(["a small red star", "two large blue rings"], seed=1).tensor
        assert (red - blue).abs().max() > 1e-4, words


@pytest.fixture(scope="module")
def tiny():
    return recipe.load("tiny").build()


@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_draws_with_the_tiny_recipe(tiny, name):
    checked = recipe.load("tiny", [f"stages.0.sampler={{name: {name}, steps: 3}}"])
    assert checked.stages[0].sampler.name == name
    pictures = tiny("a small red star on a white background", sampler=name, steps=3, num=2).tensor
    assert pictures.shape == (2, 3, 32, 32)
    assert torch.isfinite(pictures).all()
    assert pictures.std() > 0.01
    alone = tiny("a small red star on a white background", sampler=name, steps=3, seed=1).tensor
    # float32 convolutions of another batch size may sum in another order
    torch.testing.assert_close(alone[0], pictures[1], atol=1e-4, rtol=0)

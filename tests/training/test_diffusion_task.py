"""The diffusion task: times, the text cache, and what a dropped prompt becomes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from imagen_kit import data, recipe, schedules, text_encoders
from imagen_kit.training import tasks
from imagen_kit.training.config import TimesConfig
from imagen_kit.training.diffusion import TextCache, draw_times

FLOW = schedules.create("flow")


def draws(**config) -> torch.Tensor:
    return draw_times(TimesConfig(**config), 200_000, FLOW, torch.Generator().manual_seed(0))


def test_times_follow_their_distribution():
    # 200,000 draws: a share has a standard error below 0.0012, so 0.005 is four of them.
    uniform = draws(name="uniform")
    assert uniform.min() >= FLOW.t_min
    assert uniform.max() <= FLOW.t_max
    assert (uniform < 0.25).double().mean().item() == pytest.approx(0.25, abs=0.005)
    logit = torch.logit(
        (draws(name="logit_normal", mean=0.5, std=0.8) - FLOW.t_min) / (FLOW.t_max - FLOW.t_min)
    )
    assert logit.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logit.std().item() == pytest.approx(0.8, abs=0.01)
    tailed = draws(name="uniform", tail=0.5, width=0.2)
    assert (tailed > 0.8).double().mean().item() == pytest.approx(0.5 + 0.5 * 0.2, abs=0.006)


def test_the_text_cache_answers_like_the_encoder_and_asks_once():
    encoder = text_encoders.create("t5", weights="random", size="tiny", max_length=32)
    asked: list[str] = []

    class Counting(nn.Module):
        max_length = 32

        def forward(self, prompts):
            asked.extend(prompts)
            return encoder(prompts)

    cache, device = TextCache(Counting()), torch.device("cpu")
    prompts = ["a red star", "", "a blue ring", "a red star"]
    got, want = cache(prompts, device), encoder(prompts)
    assert torch.equal(got.mask, want.mask)
    # bfloat16 keeps 8 bits: a relative error of 2^-8 of each number
    torch.testing.assert_close(got.tokens, want.tokens, rtol=2**-8, atol=1e-6)
    cache(prompts, device)
    assert sorted(asked) == sorted(set(prompts))


def test_dropped_prompts_are_the_empty_prompt():
    task = tasks.build(recipe.load("tiny", ["train.stage=base"]))
    keep = torch.tensor([True, False])
    device = torch.device("cpu")
    mixed = task._text(["a small red star on a white background"] * 2, keep, device)
    empty = task.text([""], device)
    length = int(empty.mask.sum())
    assert mixed.mask[1].sum() == length
    assert torch.equal(mixed.tokens[1, :length], empty.tokens[0, :length])
    assert mixed.mask[0].sum() > length


def test_the_loss_of_a_silent_network_is_the_size_of_its_target():
    """A zero-initialised U-Net answers 0, so its flow loss is E|noise - x0|² = 1 + E|x0|²."""
    task = tasks.build(recipe.load("tiny", ["train.stage=base", "train.batch_size=512"]))
    generator = torch.Generator().manual_seed(0)
    loss = task.loss(task.module, generator, torch.device("cpu"))["loss"].item()
    x0 = data.create("pocket", pool=2000).batch(2000, task.stage.size, generator).pictures
    expected = 1 + x0.square().mean().item()
    # The mean over 512 pictures: noise and pictures spread each picture's value by about 0.4.
    assert loss == pytest.approx(expected, abs=4 * 0.4 / math.sqrt(512))


def test_training_can_go_on_from_shipped_weights():
    """``train.init: weights`` starts from the recipe's weight file; the default from fresh weights."""
    kept = recipe.load("pocket-imagen").build_stage_denoiser(0).state_dict()
    change = ["train.stage=base", "train.data.pool=10"]
    begun = tasks.build(recipe.load("pocket/base", [*change, "train.init=weights"])).module.state_dict()
    fresh = tasks.build(recipe.load("pocket/base", change)).module.state_dict()
    assert all(torch.equal(kept[name], begun[name]) for name in kept)
    assert not torch.equal(kept["stem.weight"], fresh["stem.weight"])


def test_previews_take_the_guidance_that_one_network_can_give():
    weak = "{weak: {denoiser: {name: unet, levels: [{channels: 16, blocks: 1}], head_dim: 16}}}"
    stack = "{name: cads}, {name: cfg_pp}, {name: compose, weights: {'text:fog': 2.0}}"
    changes = ["train.stage=base", "stages.0.sampler={name: ddim, steps: 2}", f"stages.0.networks={weak}"]
    pictures = []
    for guidance in (f"[{stack}]", f"[{stack}, {{name: autoguidance}}]", "[{name: cfg_pp}]"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            task = tasks.build(recipe.load("tiny", [*changes, f"stages.0.guidance={guidance}"]))
            for parameter in task.module.parameters():
                nn.init.normal_(parameter, std=0.1)
        pictures.append(task.preview(task.module, 4))
    assert pictures[0].isfinite().all()
    assert torch.equal(pictures[0], pictures[1])  # the weak network is not there
    assert not torch.equal(pictures[0], pictures[2])

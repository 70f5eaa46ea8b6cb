"""The shipped model: a prompt becomes the right picture, whoever samples it."""

from __future__ import annotations

import pytest
import torch

import imagen_kit
from imagen_kit import samplers
from imagen_kit.data.pocket import parse
from imagen_kit.evaluation.judge import Judge
from imagen_kit.samplers.nonlinear import NoTableau

PROMPTS = [
    "a large red circle on a white background",
    "a small blue square on a gray background",
    "a large yellow triangle on a black background",
    "灰色背景上的一个大绿色圆形",
]
# Noise drawn at every step needs more of them; a restart alone takes 18 evaluations.
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "restart")


@pytest.fixture(scope="module")
def pipeline():
    return imagen_kit.load("pocket-imagen")


def steps_for(name: str) -> int | None:
    """Steps of at most 20 evaluations (50 for the stochastic ones); None for a sampler that chooses them."""
    try:
        return samplers.create(name).steps_for(50 if name in STOCHASTIC else 20)
    except NoTableau:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_draws_what_is_asked(pipeline, name):
    calls = []
    hook = pipeline.stages[0].denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        images = pipeline(PROMPTS, seed=1, sampler=name, steps=steps_for(name))
    finally:
        hook.remove()
    assert len(calls) <= 50  # also of a sampler that chooses its own steps
    right = Judge().score(images.tensor, [parse(prompt) for prompt in PROMPTS])
    # One of four may be spoiled by a sampler's error; a sampler that does not fit spoils them all.
    assert int(right["all"].sum()) >= len(PROMPTS) - 1, {k: v.tolist() for k, v in right.items()}


def test_a_seed_is_enough_to_repeat_a_picture(pipeline):
    first, again = (pipeline(PROMPTS[:1], seed=3, steps=4).tensor for _ in range(2))
    assert torch.equal(first, again)
    other = pipeline(PROMPTS[:1], seed=4, steps=4).tensor
    assert (first - other).abs().max() > 0.1


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    together = pipeline(PROMPTS, seed=3, steps=4).tensor
    alone = pipeline(PROMPTS[2:3], seed=3, steps=4).tensor[0]
    # Kernels sum in another order at another batch size: float32 rounding, amplified by four steps of guidance.
    torch.testing.assert_close(together[2], alone, atol=2e-3, rtol=0)


def test_pictures_are_128_pixels_in_the_unit_range(pipeline):
    images = pipeline(PROMPTS[:1], steps=2)
    assert images.tensor.shape == (1, 3, 128, 128)
    assert images.tensor.min() >= 0
    assert images.tensor.max() <= 1

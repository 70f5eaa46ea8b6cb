from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import schedules
from imagen_kit.cascade import LowRes, augment_low_res, resize
from imagen_kit.errors import KitError


def test_level_0_is_the_resized_picture_and_level_1_the_noise():
    picture, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 8, 8)
    out = augment_low_res(picture, 8, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(out[0], resize(picture, 8)[0])
    # cos(π/2) is 4e-8 in float32
    assert torch.allclose(out[1], noise[1], atol=1e-6)


def test_resize_is_bilinear_at_half_pixel_centres():
    ramp = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    # outputs lie at -1/4, 1/4, 3/4, 5/4 between the two pixel centres, the outer ones held at the edge
    assert torch.allclose(resize(ramp, 4)[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_unit_variance_is_kept_at_every_level():
    generator = torch.Generator().manual_seed(0)
    picture, noise = (
        torch.randn(3, 3, 64, 64, generator=generator),
        torch.randn(3, 3, 64, 64, generator=generator),
    )
    out = augment_low_res(picture, 64, torch.tensor([0.2, 0.5, 0.8]), noise)
    # 12288 values: the variance has a standard error of 0.013
    assert torch.allclose(out.var(dim=(1, 2, 3)), torch.ones(3), atol=0.05)


def test_a_number_is_the_same_as_a_tensor_of_it():
    picture, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    one = augment_low_res(picture, 8, 0.3, noise)
    # float32 cos and sin against float64 ones
    assert torch.allclose(one, augment_low_res(picture, 8, torch.full((2,), 0.3), noise), atol=1e-6)
    expected = math.cos(0.15 * math.pi) * resize(picture, 8) + math.sin(0.15 * math.pi) * noise
    assert torch.allclose(one, expected, atol=1e-6)


@pytest.mark.parametrize("level", [-0.1, 1.1, math.nan, "0.5", True])
def test_a_wrong_level_is_refused(level):
    with pytest.raises(KitError, match=r"from 0 \(clean\) to 1"):
        augment_low_res(torch.zeros(1, 3, 4, 4), 8, level, torch.zeros(1, 3, 8, 8))


def test_wrong_shapes_are_refused():
    with pytest.raises(KitError, match="noise has shape"):
        augment_low_res(torch.zeros(1, 3, 4, 4), 8, 0.1, torch.zeros(1, 3, 4, 4))
    with pytest.raises(KitError, match="one per picture: 2"):
        augment_low_res(torch.zeros(2, 3, 4, 4), 8, torch.zeros(3), torch.zeros(2, 3, 8, 8))


def test_low_res_of_imagen_is_the_default():
    picture, noise, level = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    shown = LowRes()(picture, 8, level, noise)
    assert torch.equal(shown["low_res"], augment_low_res(picture, 8, level, noise))
    assert torch.equal(shown["low_res_level"], level)
    assert LowRes()(picture, 8, 0.25, noise)["low_res_level"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("told", ["level", "label"])
def test_low_res_by_the_steps_of_a_schedule(told):
    """q(x_t | x_0) = sqrt(abar_t)·x_0 + sqrt(1 − abar_t)·noise with the cumulated betas written out here."""
    roots = torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64)
    kept = (1 - roots**2).cumprod(0)
    picture, noise = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    noising = LowRes(schedules.create("scaled_linear", beta_start=1e-4, beta_end=0.02), told=told)
    shown = noising(picture, 8, torch.tensor([0.0, 0.29, 1.0]), noise)
    steps = torch.tensor([0, 290, 999])
    a = kept[steps].reshape(-1, 1, 1, 1)
    expected = a.sqrt() * picture + (1 - a).sqrt() * noise
    # alphas are rounded to float32
    assert torch.allclose(shown["low_res"].double(), expected, atol=1e-6)
    if told == "label":
        assert shown["labels"].tolist() == steps.tolist()
        assert "low_res_level" not in shown
    else:
        assert (shown["low_res_level"] * 1000).tolist() == steps.tolist()  # what the network embeds
    one = noising(picture, 8, 0.29, noise)
    assert torch.equal(one["low_res"][1], shown["low_res"][1])


def test_low_res_with_corners_in_place():
    ramp = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)
    shown = LowRes(align_corners=True)(ramp, 4, 0.0, torch.randn(1, 3, 4, 4))["low_res"]
    assert torch.allclose(shown[0, 0, 0], torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]))


def test_wrong_low_res_is_refused():
    with pytest.raises(KitError, match="did you mean 'label'"):
        LowRes(told="labels")
    with pytest.raises(KitError, match=r"give low_res\.schedule too"):
        LowRes(told="label")
    with pytest.raises(KitError, match="must be discrete"):
        LowRes(schedules.create("cosine"))
    noising = LowRes(schedules.create("cosine", timesteps=1000))
    with pytest.raises(KitError, match="noise has shape"):
        noising(torch.zeros(1, 3, 4, 4), 8, 0.1, torch.zeros(1, 3, 4, 4))
    with pytest.raises(KitError, match=r"from 0 \(clean\) to 1"):
        noising(torch.zeros(1, 3, 4, 4), 8, 2.0, torch.zeros(1, 3, 8, 8))

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit.cascade import augment_low_res, resize
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

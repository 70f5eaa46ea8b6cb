"""The group norm of pictures in both orders of memory, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imagen_kit.denoisers.layers.blocks import PictureNorm, Style, group_norm

LAST = torch.channels_last


def made(dtype, channels=32, side=8, groups=8):
    torch.manual_seed(0)
    norm = PictureNorm(groups, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, channels, side, side) + 1
    return norm.to(dtype), x.to(dtype).to(memory_format=LAST)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_numbers_and_memory_are_those_of_a_group_norm(dtype, side):
    norm, x = made(dtype, side=side)
    got = norm(x)
    want = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double())
    # float32: sums of 256 numbers; bfloat16: the answer, below 16, is rounded once by 2^-9, its factors likewise
    torch.testing.assert_close(
        got.double(), want, atol=1e-5 if dtype == torch.float32 else 16 * 3 * 2**-9, rtol=0
    )
    assert got.is_contiguous(memory_format=LAST)


@torch.no_grad()
def test_only_small_pictures_of_small_groups_in_bfloat16_are_turned():
    turned = {}
    for name, (dtype, channels, side) in {
        "small": (torch.bfloat16, 32, 8),
        "large": (torch.bfloat16, 32, 32),
        "wide groups": (torch.bfloat16, 256, 8),
        "float32": (torch.float32, 32, 8),
    }.items():
        norm, x = made(dtype, channels, side)
        turned[name] = norm._turns(x)
        assert not norm._turns(x.contiguous())
    assert turned == {"small": True, "large": False, "wide groups": False, "float32": False}


def test_derivatives_are_left_to_torch():
    norm, x = made(torch.bfloat16)
    assert not norm._turns(x)
    assert norm(x).grad_fn is not None


def test_every_norm_of_a_u_net_is_one():
    assert isinstance(group_norm(64), PictureNorm)
    assert isinstance(Style(groups=32).norm(64), PictureNorm)
    assert set(PictureNorm(8, 32).state_dict()) == set(nn.GroupNorm(8, 32).state_dict())

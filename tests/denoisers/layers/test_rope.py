"""Rotary positions: the formula, one pass or many, and the layout of patches that are rotated and normed."""

from __future__ import annotations

import pytest
import torch

from imagen_kit.denoisers.layers.rope import picture_places, rotate, rotation
from imagen_kit.denoisers.layers.transformer import PatchEmbed


def turned(x, places, widths, theta=10_000.0):
    """Every pair by its angle, number by number, in float64."""
    out = torch.empty_like(x, dtype=torch.float64)
    first = 0
    for axis, width in enumerate(widths):
        for i in range(0, width, 2):
            angle = places[:, axis].double() * theta ** (-i / width)
            even, odd = x[..., first + i].double(), x[..., first + i + 1].double()
            out[..., first + i] = angle.cos() * even - angle.sin() * odd
            out[..., first + i + 1] = angle.sin() * even + angle.cos() * odd
        first += width
    return out


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_pairs_are_turned_by_their_places(monkeypatch, compiling, dtype, atol):
    """In float32 angles up to 5 are off by 5e-7; one rounding to bfloat16 of numbers below 4 by 2^-7."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    widths, places = [4, 6, 6], picture_places(3, 2, 5)
    x = torch.randn(2, 13, 3, 16, generator=torch.Generator().manual_seed(0)).transpose(1, 2).to(dtype)
    got = rotate(x, rotation(places, widths))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), turned(x, places, widths), atol=atol, rtol=0)


def test_gradients_are_turned_back():
    turn = rotation(picture_places(0, 2, 2), [4, 2, 2])
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(rotate(x, turn).square().sum(), x)
    torch.testing.assert_close(grad, 2 * x)  # a rotation keeps the norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tokens_lie_in_their_order(layout):
    """Norms and sums along all blocks would pay for another one."""
    embed = PatchEmbed(3, 8, 2).to(memory_format=layout)
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=layout)
    tokens = embed(x)
    assert tokens.shape == (2, 6, 8)
    assert tokens.is_contiguous()

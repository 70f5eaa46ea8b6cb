"""The patch transformer's layers against torch's own attention and their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagen_kit.denoisers.layers.transformer import (
    CrossAttention,
    Mlp,
    PatchEmbed,
    SelfAttention,
    modulate,
    sincos_positions,
)


def test_positions_see_displacements_only():
    """⟨p(y, x), p(y', x')⟩ = Σ cos ω(x - x') + Σ cos ω(y - y'): the property sinusoids are chosen for."""
    h, w, dim = 3, 5, 16
    p = sincos_positions(h, w, dim).reshape(h, w, dim)
    omega = 10_000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    for y, x, y2, x2 in ((0, 0, 2, 4), (1, 3, 1, 0), (2, 2, 0, 2)):
        want = (omega * (x - x2)).cos().sum() + (omega * (y - y2)).cos().sum()
        torch.testing.assert_close(p[y, x] @ p[y2, x2], want, atol=1e-5, rtol=0)


def test_positions_of_a_grid_that_is_not_square():
    p = sincos_positions(3, 5, 16).reshape(3, 5, 16)
    assert (p[..., :8] == p[:1, :, :8]).all()  # the first half tells the column
    assert (p[..., 8:] == p[:, :1, 8:]).all()  # the second the row
    torch.testing.assert_close(p[2, 3, :8], p[3 - 1, 3, :8])
    torch.testing.assert_close(p[2, 4, 8:], p[2, 2, :8])  # both by the same numbers
    assert torch.cdist(p.reshape(15, 16), p.reshape(15, 16)).add(10 * torch.eye(15)).min() > 0.1


@pytest.mark.parity
def test_self_attention():
    torch.manual_seed(0)
    ours, oracle = SelfAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    oracle.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), oracle(x, x, x)[0], atol=1e-5, rtol=1e-5)  # float32 rounding


@pytest.mark.parity
def test_cross_attention():
    torch.manual_seed(0)
    ours, oracle = CrossAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    oracle.load_state_dict(
        {
            "in_proj_weight": torch.cat([ours.q.weight, ours.kv.weight]),
            "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x, text = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    want = oracle(x, text, text, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(x, text, mask), want, atol=1e-5, rtol=1e-5)  # float32 rounding


def test_patches_are_taken_row_by_row():
    embed = PatchEmbed(2, 8, 2)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(8).reshape(8, 2, 2, 2))
        embed.proj.bias.zero_()
        x = torch.randn(1, 2, 4, 6)
        tokens = embed(x)
    assert tokens.shape == (1, 6, 8)
    assert torch.equal(tokens[0, 1 * 3 + 2].reshape(2, 2, 2), x[0, :, 2:4, 4:6])


def test_modulate_and_mlp():
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    want = torch.stack([x[b] * (1 + scale[b]) + shift[b] for b in range(2)])
    torch.testing.assert_close(modulate(x, shift, scale), want)
    mlp = Mlp(4)
    h = nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    tanh_gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    assert h.shape[-1] == 16
    torch.testing.assert_close(mlp(x), mlp.fc2(tanh_gelu), atol=1e-6, rtol=0)

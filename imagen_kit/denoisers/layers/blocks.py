"""Convolutional and attention blocks of the U-Nets.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width, a heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.embeddings import PictureCoordinates
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture


def group_norm(channels: int, largest: int = 32) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels where the width allows."""
    groups = next(g for g in range(min(largest, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with its weights set to zero, so that a residual branch starts silent."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """GroupNorm–SiLU–conv twice with a residual path; the embedding scales and shifts the second norm.

    h = conv2(silu(norm(h)·(1 + scale) + shift)), scale, shift = linear(silu(emb)) (Dhariwal & Nichol 2021).
    """

    def __init__(self, channels: int, out_channels: int, embed_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(b, c, h, w), activated embedding (b, e) → (b, out, h, w)."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = self.embed(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(nn.functional.silu(h)))


class AttentionBlock(nn.Module):
    """Attention over the picture's cells whose keys and values are joined by those of the text, then an MLP.

    Imagen's base and 64→256 models: K = [text, cells], V likewise, in one softmax.

    Args:
        channels: width.
        head_dim: width of a head.
        context_dim: width of adapted text tokens; None for a block without text.
        expansion: hidden width of the MLP over ``channels``; 0 leaves the MLP out (as in ADM).
    """

    def __init__(self, channels: int, head_dim: int = 32, context_dim: int | None = None, expansion: int = 2):
        super().__init__()
        self.head_dim = head_dim
        self.norm = group_norm(channels)
        self.places = PictureCoordinates(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.mlp = None
        if expansion:
            hidden = expansion * channels
            self.mlp = nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, hidden),
                nn.GELU(),
                zeroed(nn.Linear(hidden, channels)),
            )

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w), text (b, n, d), mask (b, n) bool → (b, c, h, w)."""
        b, _, h, w = x.shape
        cells = to_cells(x)
        normed = to_cells(self.norm(x)) + self.places(h, w)
        q, k, v = split_heads(self.qkv(normed), 3, self.head_dim)
        if self.context is not None and context is not None:
            tk, tv = split_heads(self.context(context), 2, self.head_dim)
            k, v = torch.cat([tk, k], dim=2), torch.cat([tv, v], dim=2)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(b, h * w)], dim=1)
        else:
            mask = None
        cells = cells + self.out(join_heads(attention(q, k, v, mask)))
        if self.mlp is not None:
            cells = cells + self.mlp(cells)
        return to_picture(cells, h, w)

"""Blocks of the transformers over picture patches.

Axes: b batch, c channels, h w picture, n patches (row by row), m text tokens, d width, a heads, p patch side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.denoisers.layers.context import Context, TextReader
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture


def sincos_positions(
    h: int,
    w: int,
    dim: int,
    device: torch.device | str | None = None,
    steps: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Fixed embedding (h·w, dim) of the cells of a grid: [sin x | cos x | sin y | cos y], float32.

    x and y are column and row numbers times 10000^(-i / (dim/4)), i = 0 … dim/4 - 1: the sinusoids of Vaswani
    et al. (2017) in the two-dimensional form of MAE and DiT. ``dim`` must be a multiple of 4. ``steps``: how far
    apart rows and columns are, 1 but for grids stretched to another size.
    """
    quarter = dim // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    omega = torch.exp(-math.log(10_000.0) * exponents)
    y = torch.arange(h, dtype=torch.float32, device=device)[:, None] * steps[0] * omega
    x = torch.arange(w, dtype=torch.float32, device=device)[:, None] * steps[1] * omega
    ys = torch.cat([y.sin(), y.cos()], 1)[:, None].expand(h, w, -1)
    xs = torch.cat([x.sin(), x.cos()], 1)[None].expand(h, w, -1)
    return torch.cat([xs, ys], -1).reshape(h * w, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift with x (b, n, d), shift and scale (b, d)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate·branch with x and branch (b, n, d), gate (b, d)."""
    return torch.addcmul(x, gate[:, None], branch)


class PatchEmbed(nn.Module):
    """Squares of pixels, each projected to one token."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, (h/p)·(w/p), d)."""
        # In its order of memory the tokens stay through all residual sums: turned once here, and not by every norm.
        return to_cells(self.proj(x)).contiguous()


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    is_self_attention = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        q, k, v = split_heads(self.qkv(x), 3, x.shape[-1] // self.heads)
        return self.proj(join_heads(attention(q, k, v)))


class CompressedAttention(nn.Module):
    """Self-attention whose keys and values are those of a coarser grid (PixArt-Σ, Chen et al. 2024, §3.3).

    k and v pass a convolution of each channel by itself, ``ratio`` × ``ratio`` cells to one, and a layer norm. The
    convolution starts as the mean.

    Args:
        dim: width of a token.
        heads: number of heads.
        ratio: cells of a side that become one.
    """

    is_self_attention = False  # its values stand on another grid than its queries

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.constant_(self.sr.weight, 1 / ratio**2)
        nn.init.zeros_(self.sr.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, n, d) of a grid of (h, w) cells → (b, n, d)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = (self.norm(to_cells(self.sr(to_picture(part, *grid)))) for part in (k, v))
        q, k, v = (split_heads(part, 1, x.shape[-1] // self.heads)[0] for part in (q, k, v))
        return self.proj(join_heads(attention(q, k, v)))


class CrossAttention(TextReader):
    """Multi-head attention from patches to text tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m, d) → two of (b, a, m, d/a)."""
        k, v = split_heads(self.kv(text), 2, self.head_dim)
        return k, v

    def forward(self, x: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """Patches (b, n, d), text (b, m, d) or its keys and values, mask (b, m) bool → (b, n, d)."""
        (q,) = split_heads(self.q(x), 1, self.head_dim)
        assert context is not None
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.proj(join_heads(attention(q, k, v, mask)))


class Mlp(nn.Module):
    """Linear–GELU–Linear, GELU in its tanh form as in DiT."""

    def __init__(self, dim: int, expansion: float = 4):
        super().__init__()
        self.fc1 = LinearGelu(dim, int(expansion * dim), "tanh")
        self.fc2 = nn.Linear(int(expansion * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        return self.fc2(self.fc1(x))

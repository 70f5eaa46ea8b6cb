"""Between pictures, sequences and attention heads, with views alone.

Plain tensor methods rather than einops: its pattern cache makes a compiled network compile a second time.

Axes: b batch, c channels, h w picture, n tokens, a heads, d head width.
"""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """(b, n, parts·a·d) → ``parts`` tensors (b, a, n, d)."""
    return x.unflatten(-1, (parts, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: Tensor) -> Tensor:
    """(b, a, n, d) → (b, n, a·d)."""
    return x.transpose(1, 2).flatten(2)


def to_cells(x: Tensor) -> Tensor:
    """(b, c, h, w) → (b, h·w, c)."""
    return x.flatten(2).transpose(1, 2)


def to_picture(x: Tensor, h: int, w: int) -> Tensor:
    """(b, h·w, c) → (b, c, h, w)."""
    return x.transpose(1, 2).unflatten(2, (h, w))

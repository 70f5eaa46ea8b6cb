"""Geometry of predictions: every sample is one vector over its channels and pixels.

Axes: b batch, ... the sample's own axes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of (b, ...) with (b, ...), as (b, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))


def share(a: Tensor, b: Tensor) -> Tensor:
    """The factor s of the best fit a ≈ s·b, <a, b>/|b|², as (b, 1, ...); 0 where b vanishes."""
    return dot(a, b) / dot(b, b).clamp_min(torch.finfo(b.dtype).tiny)


def split(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a as the sum of a part along b and one orthogonal to it."""
    along = share(a, b) * b
    return along, a - along


def cast(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A weight as numbers, or a float64 tensor of weights in the picture's dtype."""
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value

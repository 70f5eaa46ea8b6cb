"""Operations on a tensor that was just made and that nobody else holds: ``fresh.silu(norm(x))``.

Where no derivative is recorded they write into its memory: the same numbers with one tensor less alive, and none that
is new to the processor's caches. With derivatives they are the usual operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    """x·sigmoid(x); x is lost."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x) (Hendrycks & Gimpel 2016); x is lost."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; x is lost, y is not. Of another dtype than x, y makes a new tensor."""
    return x + y if torch.is_grad_enabled() or y.dtype != x.dtype else x.add_(y)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x·y, as ``add``."""
    return x * y if torch.is_grad_enabled() or y.dtype != x.dtype else x.mul_(y)

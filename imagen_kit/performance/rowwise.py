"""Weights in eight bits, a scale for each row: half the memory of bfloat16, on any device, without a library.

    w ≈ s · q,  q = round(w / s) in -127 … 127,  s = max |w| / 127 of the row

No weight is off by more than s / 2. The integers are exact in bfloat16, so that only they are rounded, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) int8 and (out,) float32 scales of a weight (out, in); a row of zeros has the scale 1."""
    weight = weight.float()
    peak = torch.maximum(weight.amax(1), -weight.amin(1))  # no second copy of the weight, as abs() would make
    scale = torch.where(peak > 0, peak / LARGEST, torch.ones_like(peak))
    return (weight / scale[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer without bias, its weight in eight bits: y = (x qᵀ) · s. The input may be of any float dtype.

    Args:
        weight: (out, in), floating.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        whole, scale = quantised(weight)
        self.register_buffer("weight", whole)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(
            self.scale.device
        )  # eight bits of a scale would be worse than those of a weight
        return self

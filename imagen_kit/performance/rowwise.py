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
# Weights that a CPU turns into floats at a time, so few that they are still in its cache when they are used: of a
# layer of 4096 × 10240 and 77 tokens on one thread in bfloat16, 41 ms in place of 80 (34 with floats at hand).
IN_CACHE = 2**21


class Int8Linear(nn.Module):
    """A linear layer without bias, its weight in eight bits: y = (x qᵀ) · s. The input may be of any float dtype.

    Its weight is zero until ``take`` gives it one: room for many is best taken before that for what they are made
    from, or memory ends up in pieces.

    Args:
        in_features, out_features: as of ``torch.nn.Linear``.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))

    def take(self, weight: Tensor) -> Int8Linear:
        """Stand for ``weight`` (out, in), of any float dtype; a row of zeros gets the scale 1."""
        weight = weight.float()
        peak = torch.maximum(
            weight.amax(1), -weight.amin(1)
        )  # no second copy of the weight, as abs() would make
        self.scale.copy_(torch.where(peak > 0, peak / LARGEST, torch.ones_like(peak)))
        self.weight.copy_((weight / self.scale[:, None]).round_().clamp_(-LARGEST, LARGEST))
        return self

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.weight.shape
        if x.device.type == "cpu":
            rows = max(1, IN_CACHE // columns)
        parts = [F.linear(x, some.to(x.dtype)) for some in self.weight.split(rows)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return (out * self.scale).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(
            self.scale.device
        )  # eight bits of a scale would be worse than those of a weight
        return self

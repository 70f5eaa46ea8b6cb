"""A linear layer with its activation: two operations that some kernels do as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class LinearGelu(nn.Linear):
    """gelu(x Wᵀ + b); saved and loaded as the linear layer alone.

    Args:
        in_features, out_features: as of ``torch.nn.Linear``.
        approximate: ``none``: x·Φ(x); ``tanh``: its approximation by tanh (Hendrycks & Gimpel 2016).
        options: of ``torch.nn.Linear``: ``bias``, ``device``, ``dtype``.
    """

    def __init__(self, in_features: int, out_features: int, approximate: str = "none", **options: Any):
        super().__init__(in_features, out_features, **options)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.gelu(super().forward(x), approximate=self.approximate)

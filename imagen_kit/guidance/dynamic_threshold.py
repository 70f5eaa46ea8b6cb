"""Dynamic thresholding of the predicted picture (Saharia et al. 2022, §2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import Guidance, Step, number


@register("dynamic_threshold", extra_evaluations="none", works_in="x0")
@dataclass(frozen=True)
class DynamicThreshold(Guidance):
    """s = percentile of |x0| per sample, at least 1; clip x0 to [−s, s] and divide by s.

    Args:
        percentile: as a fraction; Imagen's figure A.10 uses 0.995.
        cap: upper bound of s (DeepFloyd IF's c); 1 is static thresholding, None no bound.

    Raises:
        KitError: a percentile outside [0, 1], a cap below 1.
    """

    percentile: float = 0.995
    cap: float | None = None
    space = "x0"

    def __post_init__(self) -> None:
        number(self.percentile, "dynamic_threshold percentile", 0.0, 1.0)
        if self.cap is not None:
            number(self.cap, "dynamic_threshold cap", low=1.0)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        s = quantile(guided.abs().flatten(1), self.percentile).clamp(min=1.0, max=self.cap)
        s = s.reshape(-1, 1, 1, 1)
        return torch.minimum(torch.maximum(guided, -s), s) / s


def quantile(values: Tensor, fraction: float) -> Tensor:
    """(b, n) → (b,) quantiles with linear interpolation, as ``torch.quantile``.

    That function refuses more than 16 M elements (eight 1024² pictures) and sorts all of them; only those
    above the quantile are ordered here.
    """
    n = values.shape[1]
    rank = fraction * (n - 1)
    low = math.floor(rank)
    top = values.topk(n - low, dim=1).values  # descending: top[:, -1] has rank low
    return torch.lerp(top[:, -1], top[:, -2], rank - low) if low < n - 1 else top[:, -1]

"""Static thresholding: the predicted picture clipped to its range (Saharia et al. 2022, §2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import Guidance, Step, number


@register("static_threshold", extra_evaluations="none", works_in="x0")
@dataclass(frozen=True)
class StaticThreshold(Guidance):
    """Clip the predicted x0 to [−limit, limit].

    Args:
        limit: bound of the data, 1 for pictures.

    Raises:
        KitError: a limit that is not a number above 0.
    """

    limit: float = 1.0
    space = "x0"

    def __post_init__(self) -> None:
        number(self.limit, "static_threshold limit", low=1e-6)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return guided.clamp(-self.limit, self.limit)

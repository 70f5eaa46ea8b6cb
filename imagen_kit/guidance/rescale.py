"""Rescaling of the guided prediction to the conditional one's spread (Lin et al. 2023, §3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import Guidance, Step, check_space, number


@register("rescale", extra_evaluations="none", works_in="raw")
@dataclass(frozen=True)
class Rescale(Guidance):
    """φ·guided·std(cond)/std(guided) + (1 − φ)·guided (Lin et al. 2023, eqs. 15-16).

    The standard deviations are those of each sample over c h w. Stands after the strategy it tames; leaves an
    unguided prediction as it is.

    Args:
        phi: 0 (off) to 1 (spread of the conditional prediction).
        space: the paper acts on the network's raw output; the result depends on it.

    Raises:
        KitError: phi outside [0, 1], unknown space.
    """

    phi: float = 0.7
    space: str = "raw"

    def __post_init__(self) -> None:
        number(self.phi, "rescale phi", 0.0, 1.0)
        check_space(self.space)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        if guided is predictions["cond"]:
            return guided
        wanted = predictions["cond"].std(dim=(1, 2, 3), keepdim=True)
        found = guided.std(dim=(1, 2, 3), keepdim=True)
        # a flat prediction has no spread to restore: the floor keeps 0/0 out
        ratio = wanted / found.clamp_min(torch.finfo(found.dtype).tiny)
        return guided * (self.phi * ratio + (1 - self.phi))

"""Classifier-free guidance (Ho & Salimans 2022), in Imagen's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import (
    UNCOND,
    Branch,
    Guidance,
    Step,
    check_interval,
    check_space,
    inside,
    number,
)


@register("cfg", extra_evaluations="1 (uncond); none at scale 1 and outside the interval", works_in="raw")
@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance: scale·cond + (1 − scale)·uncond (Saharia et al. 2022, eq. 2).

    Scale 1 is no guidance and costs one evaluation. Ho & Salimans' weight is w = scale − 1.

    Args:
        scale: guidance scale, any finite number.
        interval: (low, high): act where low < sigma/alpha ≤ high only (Kynkäänniemi et al. 2024), and
            evaluate ``cond`` alone elsewhere.
        space: where the predictions are combined; the result is the same in every space up to rounding.
        channels: how many channels are guided, from the first; None for all. DiT's authors guide three of four
            latent channels, and so were its published figures made.

    Raises:
        KitError: a scale that is not a number, a wrong interval, an unknown space, channels that are not a
            whole number of at least 1.
    """

    scale: float = 7.5
    interval: Sequence[float] | None = None
    space: str = "raw"
    channels: int | None = None
    of_prompt = True

    def __post_init__(self) -> None:
        number(self.scale, "guidance scale")
        check_space(self.space)
        if self.interval is not None:
            check_interval(self.interval)
        given = self.channels
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise KitError(
                f"cfg channels must be a whole number of at least 1, or null for all, got {given!r}"
            )

    @property
    def needs(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (UNCOND,)

    def active(self, step: Step) -> bool | Tensor:
        if self.scale == 1:
            return False
        return self.interval is None or inside(step, self.interval[0], self.interval[1], "sigma")

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        # guided is cond when CFG stands first: cond + (w − 1)(cond − uncond) = w·cond + (1 − w)·uncond
        cond, uncond = predictions["cond"], predictions["uncond"]
        if guided is cond:
            changed = torch.lerp(uncond, cond, self.scale)  # the same in one pass over memory
        else:
            changed = torch.add(guided, cond - uncond, alpha=self.scale - 1)
        if self.channels is None:
            return changed
        return torch.cat([changed[:, : self.channels], guided[:, self.channels :]], dim=1)

    def with_scale(self, scale: float) -> CFG:
        return replace(self, scale=scale)

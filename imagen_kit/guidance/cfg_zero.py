"""CFG-Zero*: classifier-free guidance for flow matching (Fan et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import UNCOND, Branch, Guidance, Step, number
from imagen_kit.guidance.vectors import share


@register("cfg_zero", extra_evaluations="1 (uncond); none in the zeroed steps", works_in="flow")
@dataclass(frozen=True)
class CFGZero(Guidance):
    """scale·cond + (1 − scale)·s*·uncond with s* = <cond, uncond>/|uncond|² per sample (Fan et al. 2025).

    The velocity of the first steps is zero (zero-init): the network's first guess is worse than none. It acts
    on the flow velocity, which every other prediction is turned into; zero velocity keeps x/(alpha + sigma).

    Args:
        scale: guidance scale, any finite number; 1 is no guidance after the zeroed steps.
        zero_steps: steps whose velocity is zero (the paper: 1, or 4 % of the steps).
        optimize: use s*; without it the second part is CFG.

    Raises:
        KitError: a scale that is not a number, zero_steps that is not a whole number from 0; when called, a
            run whose grid is not known (unless zero_steps is 0).
    """

    scale: float = 4.0
    zero_steps: int = 1
    optimize: bool = True
    space = "flow"
    of_prompt = True

    def __post_init__(self) -> None:
        number(self.scale, "cfg_zero scale")
        if isinstance(self.zero_steps, bool) or not isinstance(self.zero_steps, int) or self.zero_steps < 0:
            raise KitError(f"cfg_zero zero_steps must be a whole number from 0, got {self.zero_steps!r}")

    @property
    def needs(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (UNCOND,)

    def _zeroed(self, step: Step) -> bool | Tensor:
        # a place just short of a whole number is that number, rounded
        return self.zero_steps > 0 and step.place < self.zero_steps - 1e-6

    def reads(self, step: Step) -> tuple[Branch, ...]:
        return () if self._zeroed(step) is True else self.needs

    def active(self, step: Step) -> bool | Tensor:
        return True if self.scale != 1 else self._zeroed(step)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        zeroed = self._zeroed(step)
        if zeroed is True:
            return torch.zeros_like(guided)
        after = guided
        if self.scale != 1:
            cond, uncond = predictions["cond"], predictions["uncond"]
            best = share(cond, uncond) * uncond if self.optimize else uncond
            after = guided + (self.scale - 1) * (cond - best)
        return torch.where(zeroed, 0.0, after) if isinstance(zeroed, Tensor) else after

    def with_scale(self, scale: float) -> CFGZero:
        return replace(self, scale=scale)

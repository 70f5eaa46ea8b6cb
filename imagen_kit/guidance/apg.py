"""Adaptive projected guidance (Sadat et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import UNCOND, Branch, Generators, Guidance, Step, number
from imagen_kit.guidance.vectors import dot, split


@dataclass
class Memory:
    """The running average of one run: Δ̄ ← Δ + β·Δ̄, moved on once a call."""

    step: Step | None = None
    average: Tensor | None = None

    def update(self, step: Step, change: Tensor, momentum: float) -> Tensor:
        """The average with the difference of this step, (b, c, h, w)."""
        if step is self.step and self.average is not None:
            return self.average
        old = self.average
        new = change if old is None else change + momentum * old
        if step.where is not None:  # samples for which the strategy rests keep their average
            new = torch.where(step.where, new, torch.zeros_like(new) if old is None else old)
        self.step, self.average = step, new
        return new


@register("apg", extra_evaluations="1 (uncond); none at scale 1", works_in="x0")
@dataclass(frozen=True)
class APG(Guidance):
    """CFG on x0 whose difference is averaged, bounded and freed of its part along x0 (Sadat et al. 2024).

        Δ̄ = (cond − uncond) + momentum·Δ̄ of the evaluation before;   Δ = Δ̄·min(1, norm/|Δ̄|)
        x0 = cond + (scale − 1)·(Δ⊥ + eta·Δ∥),   ∥ and ⊥ to cond, sample by sample

    With eta = 1, momentum = 0 and norm = None it is CFG.

    Args:
        scale: guidance scale, any finite number.
        eta: part of Δ∥ that is kept, which is what oversaturates; 0 in the paper.
        norm: bound r of |Δ̄| over all values of a sample, so it goes with the model's size and spread (2.5 to
            15 in the paper, on latents); None = no bound.
        momentum: β of the running average, negative in the paper (about −0.5); 0 = none. It goes by
            evaluations, and is kept by the run: ``denoise.begin()``, which samplers call.

    Raises:
        KitError: a number out of range; when called with momentum outside a run.
    """

    scale: float = 4.0
    eta: float = 0.0
    norm: float | None = None
    momentum: float = 0.0
    memory: Memory | None = field(default=None, init=False, repr=False, compare=False)
    space = "x0"
    of_prompt = True

    def __post_init__(self) -> None:
        number(self.scale, "apg scale")
        number(self.eta, "apg eta")
        number(self.momentum, "apg momentum", -1.0, 1.0)
        if self.norm is not None and number(self.norm, "apg norm", low=0.0) == 0:
            raise KitError("apg norm must be above 0; leave it out for no bound")

    @property
    def needs(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (UNCOND,)

    def active(self, step: Step) -> bool:
        return self.scale != 1

    def begin(self, generator: Generators | None = None) -> APG:
        return self._remembering(Memory())

    def _remembering(self, memory: Memory | None) -> APG:
        run = replace(self)
        object.__setattr__(run, "memory", memory)
        return run

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        cond = predictions["cond"]
        change = cond - predictions["uncond"]
        if self.momentum:
            if self.memory is None:
                raise KitError(
                    "guidance apg with momentum remembers one run: denoise = denoise.begin(), as samplers do"
                )
            change = self.memory.update(step, change, self.momentum)
        if self.norm is not None:
            length = dot(change, change).sqrt()
            change = change * (self.norm / length.clamp_min(self.norm))
        along, across = split(change, cond)
        return guided + (self.scale - 1) * (across + self.eta * along)

    def with_scale(self, scale: float) -> APG:
        return replace(self, scale=scale)._remembering(self.memory)

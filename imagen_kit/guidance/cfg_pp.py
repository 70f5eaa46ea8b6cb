"""CFG++: guidance that stays on the data manifold (Chung et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from imagen_kit.guidance import register
from imagen_kit.guidance.base import UNCOND, Branch, Guidance, Step, check_interval, inside, number


@register("cfg_pp", extra_evaluations="1 (uncond); none outside the interval", works_in="raw")
@dataclass(frozen=True)
class CFGPP(Guidance):
    """CFG++: x0 = x0ᵤ + λ·(x0ᶜ − x0ᵤ), the noise put back from ``uncond`` (Chung et al. 2024, alg. 2).

    The picture is CFG's at a scale from 0 to 1; what is new is the sampler's half, its option
    ``renoise="uncond"``, which the pipeline sets by itself. Under DDIM it is CFG at the scale
    λ·α′σ/(α′σ − ασ′), which falls along the run; alpha, sigma before and alpha′, sigma′ after the step.

    Args:
        scale: λ from 0 (unconditional) to 1; 0.6 does about what CFG does at 7.5.
        interval: (low, high): act where low < sigma/alpha ≤ high only; elsewhere there is no guidance and the
            noise is the conditional one.

    Raises:
        KitError: a scale that is not a number from 0 to 1, a wrong interval.
    """

    scale: float = 0.6
    interval: Sequence[float] | None = None
    of_prompt = True
    renoise = "uncond"

    def __post_init__(self) -> None:
        number(self.scale, "cfg_pp scale", 0.0, 1.0)
        if self.interval is not None:
            check_interval(self.interval)

    @property
    def needs(self) -> tuple[Branch, ...]:
        return (UNCOND,)

    def active(self, step: Step) -> bool | Tensor:
        return self.interval is None or inside(step, self.interval[0], self.interval[1], "sigma")

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return guided + (self.scale - 1) * (predictions["cond"] - predictions["uncond"])

    def with_scale(self, scale: float) -> CFGPP:
        return replace(self, scale=scale)

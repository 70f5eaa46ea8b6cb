"""Autoguidance: a network led away from a bad version of itself (Karras et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import Branch, Guidance, Step, number


@register("autoguidance", extra_evaluations="1 of the other network; none at scale 1", works_in="raw")
@dataclass(frozen=True)
class Autoguidance(Guidance):
    """cond + (scale − 1)·(cond − weak): scale·D₁ + (1 − scale)·D₀ (Karras et al. 2024).

    The weak network is smaller or less trained, of the same schedule and prediction as the main one. It is
    handed over by name: ``denoise_fn(..., networks={"weak": network})``, or ``networks: {weak: {denoiser:
    ..., weights: ...}}`` of a recipe's stage. Guided by itself, a network is not guided.

    Args:
        scale: guidance scale, any finite number; 1 is no guidance.
        network: name of the weak network.
        cond: conditioning it is given: ``cond`` as in the paper, or ``uncond`` (the unconditional weak
            network that EDM2's CFG uses).

    Raises:
        KitError: a scale that is not a number; a name that is not text.
    """

    scale: float = 2.0
    network: str = "weak"
    cond: str = "cond"

    def __post_init__(self) -> None:
        number(self.scale, "autoguidance scale")
        for option in ("network", "cond"):
            value = getattr(self, option)
            if not isinstance(value, str) or not value:
                raise KitError(f"autoguidance {option} must be a name, got {value!r}")

    @property
    def _branch(self) -> Branch:
        return Branch(f"{self.network}.{self.cond}", self.cond, network=self.network)

    @property
    def needs(self) -> tuple[Branch, ...]:
        return () if self.scale == 1 else (self._branch,)

    def active(self, step: Step) -> bool:
        return self.scale != 1

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return guided + (self.scale - 1) * (predictions["cond"] - predictions[self._branch.name])

    def with_scale(self, scale: float) -> Autoguidance:
        return replace(self, scale=scale)

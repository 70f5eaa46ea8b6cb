"""Perpendicular negative prompts (Armandpour et al. 2023, Perp-Neg)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import Branch, Guidance, Step, number
from imagen_kit.guidance.vectors import split

NULL = Branch("null", cond="null")


@register("perp_neg", extra_evaluations="1 (null) and 1 for each negative prompt", works_in="raw")
@dataclass(frozen=True)
class PerpNeg(Guidance):
    """null + scale·(Δ − weight·Σ Δᵢ⊥), Δ = cond − null, Δᵢ = negativeᵢ − null (Armandpour et al. 2023).

    ⊥ is the part orthogonal to Δ, sample by sample: what a negative prompt shares with the prompt is left
    alone. A negative prompt that is parallel to the prompt, or empty, has no effect: there remains CFG.

    ``null`` is no text at all. The pipeline has it; ``denoise_fn`` takes it as ``others={"null": ...}``.

    Args:
        scale: guidance scale, any finite number.
        weight: of every negative prompt, from 0.
        negatives: their conditionings: ``uncond``, the pipeline's negative prompt, and others such as
            ``text:blurry``.

    Raises:
        KitError: a number out of range, no negatives.
    """

    scale: float = 7.5
    weight: float = 1.0
    negatives: Sequence[str] = ("uncond",)
    of_prompt = True

    def __post_init__(self) -> None:
        number(self.scale, "perp_neg scale")
        number(self.weight, "perp_neg weight", low=0.0)
        listed = not isinstance(self.negatives, str) and isinstance(self.negatives, Sequence)
        if not listed or not self.negatives or not all(isinstance(name, str) for name in self.negatives):
            raise KitError(f"perp_neg negatives must be a list of names, got {self.negatives!r}")
        object.__setattr__(self, "negatives", tuple(self.negatives))

    @property
    def needs(self) -> tuple[Branch, ...]:
        return (NULL, *(Branch(name, name) for name in self.negatives if self.weight))

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        null = predictions["null"]
        change = predictions["cond"] - null
        guided = guided + (self.scale - 1) * change
        for branch in self.needs[1:]:
            _, across = split(predictions[branch.name] - null, change)
            guided = guided - self.scale * self.weight * across
        return guided

    def with_scale(self, scale: float) -> PerpNeg:
        return replace(self, scale=scale)

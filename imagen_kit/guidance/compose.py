"""Several weighted prompts at once: composable diffusion (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import UNCOND, Branch, Guidance, Step, number


@register("compose", extra_evaluations="1 for each further prompt and 1 (uncond)", works_in="raw")
@dataclass(frozen=True)
class Compose(Guidance):
    """Adds Σ wᵢ·(promptᵢ − uncond): with CFG uncond + scale·(cond − uncond) + Σ wᵢ·(promptᵢ − uncond).

    That is the conjunction of Liu et al. 2022, CFG's scale being the weight of the first prompt; a
    negative weight is their negation.

    Args:
        weights: weight by conditioning: ``{"text:watercolour": 2.0}`` in a recipe or pipeline, which makes
            the conditioning from the text; any name of ``denoise_fn(..., others=)``. The pipeline's ``also``
            adds such a strategy by itself.

    Raises:
        KitError: no prompts, a weight that is not a number.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise KitError(f"compose weights must be a map of prompts to weights, got {self.weights!r}")
        for name, weight in self.weights.items():
            number(weight, f"compose weight of {name!r}")
        object.__setattr__(self, "weights", {str(name): weight for name, weight in self.weights.items()})

    @property
    def needs(self) -> tuple[Branch, ...]:
        acting = tuple(Branch(name, name) for name, weight in self.weights.items() if weight)
        return (UNCOND, *acting) if acting else ()

    def active(self, step: Step) -> bool:
        return bool(self.needs)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        for branch in self.needs[1:]:
            change = predictions[branch.name] - predictions["uncond"]
            guided = guided + self.weights[branch.name] * change
        return guided

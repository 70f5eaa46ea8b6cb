"""Classifier guidance (Dhariwal & Nichol 2021): a denoiser led by a classifier of noisy pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import COND, Branch, Guidance, Network, Step, number


def gradient(network: Network) -> Network:
    """∇ log p(y | x) by x (b, c, h, w), of a classifier ``network(x, t, cond)`` → logits (b, classes)."""

    def slope(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if cond.labels is None:
            raise KitError("guidance by a classifier needs class labels: there are none in cond")
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            logits = network(start, t, cond).float()
            told = logits.log_softmax(-1).gather(1, cond.labels[:, None])
            # pictures do not act on each other, so the sum's gradient is each picture's own
            return torch.autograd.grad(told.sum(), start)[0]

    return slope


@register(
    "classifier", extra_evaluations="1 of the classifier, and its gradient; none at scale 0", works_in="eps"
)
@dataclass(frozen=True)
class Classifier(Guidance):
    """eps − scale·sigma·∇ log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 2, for any alpha and sigma).

    The classifier is another network of the stage, trained on noisy pictures of the same schedule: called with
    x_t, t and the conditioning, it answers logits (b, classes). It is handed over by name: ``denoise_fn(...,
    networks={"classifier": network})``, or ``networks: {classifier: {denoiser: adm_classifier_256, weights:
    ...}}`` of a recipe's stage. y is the class in ``cond.labels``. Where x0 is kept in a range, that stands before
    it in the stack: the authors clip what the network says and not what the classifier makes of it. Their ancestral
    sampler moves the mean of a step by scale·variance·∇ log p instead, which is this to first order in the step.

    Args:
        scale: guidance scale; 1 follows Bayes' rule, 0 is no guidance.
        network: name of the classifier.

    Raises:
        KitError: a scale that is not a number; a name that is not text; when called, no class labels, or a
            prediction (edm) whose network is not fed x_t itself.
    """

    scale: float = 1.0
    network: str = "classifier"
    space = "eps"
    neutral = 0.0
    of_prompt = True

    def __post_init__(self) -> None:
        number(self.scale, "classifier scale")
        if not isinstance(self.network, str) or not self.network:
            raise KitError(f"classifier network must be a name, got {self.network!r}")

    @property
    def _branch(self) -> Branch:
        return Branch(f"{self.network}.gradient", COND.cond, gradient, self.network, is_gradient=True)

    @property
    def needs(self) -> tuple[Branch, ...]:
        return () if self.scale == 0 else (self._branch,)

    def active(self, step: Step) -> bool:
        return self.scale != 0

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        sigma = step.sigma.to(guided) if isinstance(step.sigma, Tensor) else step.sigma
        return guided - self.scale * sigma * predictions[self._branch.name]

    def with_scale(self, scale: float) -> Classifier:
        return replace(self, scale=scale)

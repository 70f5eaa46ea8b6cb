"""TaylorSeer: the inner part's answers forecast from its last ones (Liu et al. 2025).

Axes: b batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imagen_kit.caches import register
from imagen_kit.caches.base import Fixed, Memory, Turn, rises, whole
from imagen_kit.caches.interval import every_nth
from imagen_kit.errors import KitError, unknown

AXES = ("steps", "t")


@register("taylor", waits=0, capturable=True)
@dataclass(frozen=True)
class Taylor(Fixed):
    """Compute at every n-th evaluation; between them go on along the polynomial through the last ones computed.

    With finite differences for derivatives, Taylor's series of order k is the polynomial through the last k + 1
    answers F(s_0) … F(s_k). It is evaluated in Lagrange's form, which knows no even spacing,

        F(s) ≈ Σ_j F(s_j) · Π_{i≠j} (s − s_i) / (s_j − s_i),

    exact where F is a polynomial in s of degree k. While fewer are known the order is lower; order 0 is ``interval``.

    Args:
        order: k. Higher orders amplify what is not smooth, as stochastic samplers are not.
        every: n; 1 computes always.
        warm_up: evaluations at the start that are all computed; the count by n goes on from the last of them.
        axis: what s is: ``steps`` taken, as in the paper, or native time ``t``; evaluations, where the grid is not
            known or times are tensors.
        depth: blocks (of a U-Net: skip connections) outside, computed at every evaluation.

    Raises:
        KitError: numbers that are not whole or too small, an unknown axis.
    """

    order: int = 1
    every: int = 3
    warm_up: int = 1
    axis: str = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "order", least=0)
        whole(self, "every", least=1)
        whole(self, "warm_up", least=1)
        if self.axis not in AXES:
            raise KitError(unknown("cache axis", self.axis, AXES))

    def full(self, turn: Turn) -> bool:
        return every_nth(turn.number, self.every, self.warm_up)

    def memory(self) -> Memory:
        return _History(axis=self.axis, most=self.order + 1)


@dataclass
class _History(Memory):
    """The last answers with their places, the newest last. Branches are computed whole or not at all."""

    axis: str = "steps"
    most: int = 1
    known: list[tuple[float, Tensor]] = field(default_factory=list)

    def recall(self, turn: Turn) -> Tensor:
        weights = lagrange(self._place(turn), [place for place, _ in self.known])
        rests = [rest for _, rest in self.known]
        if len(rests) == 1:
            return rests[0]
        work = torch.promote_types(rests[0].dtype, torch.float32)
        total = rests[0].to(work) * weights[0]
        for weight, rest in zip(weights[1:], rests[1:], strict=True):
            total.add_(rest, alpha=weight)
        return total.to(rests[0].dtype)

    def keep(self, turn: Turn, wanted: Sequence[bool], rest: Tensor, probe: Tensor) -> None:
        place = self._place(turn)
        if not self.fits(probe) or rises(turn, self):  # what came before belongs to another way down
            self.known = []
        if self.known and self.known[-1][0] == place:
            self.known.pop()  # as in a solver's second stage: the newer answer counts
        self.known = [*self.known, (place, rest)][-self.most :]
        super().keep(turn, wanted, rest, probe)

    def _place(self, turn: Turn) -> float:
        if self.axis == "t" and not isinstance(turn.t, Tensor):
            return float(turn.t)
        return float(turn.number) if turn.place is None else turn.place


def lagrange(at: float, nodes: Sequence[float]) -> list[float]:
    """Weights of the values at ``nodes`` in the value at ``at`` of the polynomial through them; they sum to 1."""
    return [
        math.prod((at - other) / (node - other) for i, other in enumerate(nodes) if i != j)
        for j, node in enumerate(nodes)
    ]

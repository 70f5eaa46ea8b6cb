"""The whole network at every n-th evaluation, its outer part at the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagen_kit.caches import register
from imagen_kit.caches.base import Fixed, Turn, whole
from imagen_kit.errors import KitError


@register("interval", waits=0, capturable=True)
@dataclass(frozen=True)
class Interval(Fixed):
    """Compute at every n-th evaluation, or at given ones; between them answer what was computed last.

    Args:
        every: n; 1 computes always.
        warm_up: evaluations at the start that are all computed; the count by n goes on from the last of them.
        full_at: in place of both, the numbers of the evaluations to compute, from 0, which always is.
        depth: blocks (of a U-Net: skip connections) outside, computed at every evaluation.

    Raises:
        KitError: numbers that are not whole or too small.
    """

    every: int = 2
    warm_up: int = 1
    full_at: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "every", least=1)
        whole(self, "warm_up", least=1)
        if self.full_at is not None:
            object.__setattr__(self, "full_at", _numbers(self.full_at))

    def full(self, turn: Turn) -> bool:
        if self.full_at is not None:
            return turn.number in self.full_at
        return every_nth(turn.number, self.every, self.warm_up)


def every_nth(number: int, every: int, warm_up: int) -> bool:
    """Whether evaluation ``number`` is one of the first ``warm_up``, or ``every`` after the last of them, and so on."""
    return number < warm_up or (number - warm_up + 1) % every == 0


def _numbers(value: object) -> tuple[int, ...]:
    fine = isinstance(value, Sequence) and not isinstance(value, str)
    if not fine or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):  # type: ignore[attr-defined]
        raise KitError(f"cache full_at must be a list of whole numbers from 0, got {value!r}")
    return tuple(value)  # type: ignore[arg-type]

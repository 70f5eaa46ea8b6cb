"""Changes added up from step to step until they are worth a computation (Liu et al. 2024, TeaCache).

Axes: b batch, m branches in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from imagen_kit.caches import register
from imagen_kit.caches.base import Memory, StepCache, Turn, whole
from imagen_kit.caches.first_block import change, read, refuse_capture
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import number


@register("accumulated", waits=1, capturable=False)
@dataclass(frozen=True)
class Accumulated(StepCache):
    """Add up the relative change of the first block from evaluation to evaluation; compute when it is enough.

    With r_i the first block's change to the tokens at evaluation i (of a U-Net: what the outer part hands to the
    inner), a sample is computed when Σ f(mean|r_i − r_{i−1}| / mean|r_{i−1}|) since its last computation reaches the
    threshold. f is a polynomial fitted to how the network's answer changes with r (TeaCache, eq. 7). Where
    ``first_block`` measures the way from the last computation in a straight line, this one measures it along the
    path, and so never overlooks a path that comes back. Deciding takes one read from the device a call.

    Args:
        threshold: the sum at which a sample is computed; 0 computes always.
        rescale: coefficients of f, the constant first; (0, 1) leaves changes as they are.
        warm_up: evaluations at the start that are all computed.
        depth: blocks (of a U-Net: skip connections) outside, computed at every evaluation.

    Raises:
        KitError: numbers out of range; in a run, inside the capture of a CUDA graph.
    """

    threshold: float = 0.15
    rescale: Sequence[float] = (0.0, 1.0)
    warm_up: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.threshold, "cache threshold", 0.0)
        whole(self, "warm_up", least=1)
        if isinstance(self.rescale, str) or not isinstance(self.rescale, Sequence) or not self.rescale:
            raise KitError(
                f"cache rescale must be a list of coefficients, the constant first, got {self.rescale!r}"
            )
        numbers = tuple(number(value, "cache rescale coefficient") for value in self.rescale)
        object.__setattr__(self, "rescale", numbers)

    def memory(self) -> Memory:
        return _Sums()

    def wanted(self, turn: Turn, memories: Sequence[Memory], probes: Sequence[Tensor]) -> list[list[bool]]:
        refuse_capture("accumulated", probes[0])
        asked = [m.fits(probe) for m, probe in zip(memories, probes, strict=True)]
        seen = [(p, m.seen) for p, m, ask in zip(probes, memories, asked, strict=True) if ask]  # type: ignore[attr-defined]
        changes = iter(read([change(now, then) for now, then in seen]))
        out = []
        for memory, probe, ask in zip(memories, probes, asked, strict=True):
            assert isinstance(memory, _Sums)
            memory.seen = probe
            calm = ask and turn.number >= self.warm_up
            added = [self._scaled(c) for c in next(changes)] if ask else [0.0] * len(probe)
            out.append(memory.decide(added, self.threshold if calm else None))
        return out

    def _scaled(self, value: float) -> float:
        """f(value)."""
        return sum(c * value**i for i, c in enumerate(self.rescale))


@dataclass
class _Sums(Memory):
    """Also remembers what the outer part was like at the evaluation before, and each sample's sum."""

    seen: Tensor | None = None
    sums: list[float] = field(default_factory=list)

    def decide(self, added: Sequence[float], threshold: float | None) -> list[bool]:
        """Whether each sample is computed once this has been added; all are where there is no threshold."""
        sums = self.sums if len(self.sums) == len(added) else [0.0] * len(added)
        totals = [total + more for total, more in zip(sums, added, strict=True)]
        # not a number (no change of nothing) is no small sum
        wanted = [threshold is None or not total < threshold for total in totals]
        self.sums = [0.0 if w else total for w, total in zip(wanted, totals, strict=True)]
        return wanted

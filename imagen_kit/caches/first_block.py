"""First-block cache: the first block tells whether the others have anything new to say.

Axes: b batch, m branches in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imagen_kit.caches import register
from imagen_kit.caches.base import Memory, StepCache, Turn, whole
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import number


@register("first_block", waits=1, capturable=False)
@dataclass(frozen=True)
class FirstBlock(StepCache):
    """Run the first block; compute the rest for the samples where the block's change is no longer what it was.

    With r the first block's change to the tokens (of a U-Net: what the outer part hands to the inner) and r' that at
    the sample's last computed evaluation, a sample is computed when mean|r − r'| / mean|r'| ≥ threshold. Each sample
    is decided by itself, and those to compute are gathered. (TeaCache, Liu et al. 2024, measures relative change
    so; ParaAttention, Cheng 2024, at the first block.) Deciding takes one read from the device a call.

    Args:
        threshold: relative change from which a sample is computed; 0 computes always.
        warm_up: evaluations at the start that are all computed.
        max_skips: most evaluations in a row that a sample may go without; None = any number.
        depth: blocks (of a U-Net: skip connections) that make up the first "block".

    Raises:
        KitError: numbers out of range; in a run, inside the capture of a CUDA graph.
    """

    threshold: float = 0.08
    warm_up: int = 1
    max_skips: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.threshold, "cache threshold", 0.0)
        whole(self, "warm_up", least=1)
        if self.max_skips is not None:
            whole(self, "max_skips", least=0)

    def memory(self) -> Memory:
        return Skipping()

    def wanted(self, turn: Turn, memories: Sequence[Memory], probes: Sequence[Tensor]) -> list[list[bool]]:
        refuse_capture("first_block", probes[0])
        asked = [
            turn.number >= self.warm_up and memory.fits(probe)
            for memory, probe in zip(memories, probes, strict=True)
        ]
        pairs = [(p, m.probe) for p, m, ask in zip(probes, memories, asked, strict=True) if ask]
        small = iter(read([change(now, then) < self.threshold for now, then in pairs if then is not None]))
        out = []
        for memory, probe, ask in zip(memories, probes, asked, strict=True):
            assert isinstance(memory, Skipping)
            calm = next(small) if ask else [False] * len(probe)
            out.append(memory.decide(calm, self.max_skips))
        return out


@dataclass
class Skipping(Memory):
    """Also remembers how many evaluations in a row each sample went without."""

    skips: list[int] = field(default_factory=list)

    def decide(self, calm: Sequence[bool], most: int | None) -> list[bool]:
        """Whether each sample is computed, given whether it could go without."""
        skips = self.skips if len(self.skips) == len(calm) else [0] * len(calm)
        wanted = [not c or (most is not None and n >= most) for c, n in zip(calm, skips, strict=True)]
        self.skips = [0 if w else n + 1 for w, n in zip(wanted, skips, strict=True)]
        return wanted


def change(now: Tensor, then: Tensor) -> Tensor:
    """(b, ...), (b, ...) → (b,) float32: mean|now − then| / mean|then|; not a number where both are zero."""
    difference = (now - then).flatten(1).abs().mean(1, dtype=torch.float32)
    return difference / then.flatten(1).abs().mean(1, dtype=torch.float32)


def read(columns: Sequence[Tensor]) -> list[list]:
    """Columns (b,) of equal length as lists, with one read from the device."""
    return torch.stack(list(columns)).tolist() if columns else []


def refuse_capture(name: str, x: Tensor) -> None:
    """KitError while a CUDA graph is captured: there the host cannot read what the device has computed."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KitError(
            f"cache {name} decides on the host, so a CUDA graph cannot hold it; use taylor, interval or deep_cache"
        )

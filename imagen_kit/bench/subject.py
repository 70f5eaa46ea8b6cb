"""What a benchmark measures: a case (what is asked for) and its subjects (who does that work).

A case such as ``denoiser/dit_xl_2/batch=8,dtype=bf16`` is built into several subjects: the kit's first, then
peers, all with the same weights and inputs where that is possible. A subject does its work once a call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from imagen_kit.bench.floor import Floor

#: The entry that every other one of a row is compared with.
OURS = "imagen_kit"


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        kind: registered kind of subject, such as ``denoiser``; see ``imagen_kit.bench.subjects``.
        name: what of that kind: a size's name, a sampler, a recipe.
        options: plain values (numbers, texts, booleans, None) that the kind's builder takes.
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stable text: ``kind/name/key=value,...`` with the keys in alphabetical order."""
        told = ",".join(f"{key}={_plain(self.options[key])}" for key in sorted(self.options))
        return f"{self.kind}/{self.name}" + (f"/{told}" if told else "")

    @property
    def group(self) -> str:
        """Cases of one group are measured by one process, which may keep what they share."""
        return f"{self.kind}/{self.name}"


class Subject:
    """Someone who does a case's work. Sub-classes define ``__call__``, and what differs from the defaults here.

    Attributes:
        unit: what is counted per second: ``evaluations``, ``pictures``, ``prompts``, ``steps``, ``starts`` ...
        units: how many of them one call does.
        steps: sampler steps within a call; None where there are none.
        passes: how often one call reads all weights (network evaluations in a row).
        modules: whose parameters and buffers are this subject's weights.
        inputs: tensors that a call reads; they count as device tensors when waits are looked for.
        note: what was chosen, in words: backend, precision, what differs from the others.
        precision: what its matrix products are computed in (fp32, tf32, bf16, fp16, int8, fp8), for the share of the
            ceiling; None: that of its weights.
        comparable: whether its result should be the kit's (the same weights, inputs and noise).
        compile_seconds: spent on compiling while it was built; what the first call takes longer comes on top.
        seconds: of the last call, set by a subject that has to time itself (work in a process that it starts);
            None leaves that to the clock.
        countable: whether operations may be counted (FLOPs, bytes, waits) over a call of ``eager``.
        loading: most bytes that were held while its weights were read in; None where nobody looked.
        floor: the least memory that its operations need, where that was measured: the row then has the peak over it.
    """

    unit: str = "evaluations"
    units: int = 1
    steps: int | None = None
    passes: int = 1
    modules: Sequence[nn.Module] = ()
    inputs: Sequence[Tensor] = ()
    note: str = ""
    precision: str | None = None
    comparable: bool = True
    compile_seconds: float = 0.0
    seconds: float | None = None
    countable: bool = True
    loading: int | None = None
    floor: Floor | None = None

    def __call__(self) -> Tensor | None:
        """Do the work once, without waiting for the device; the result is what peers' are compared with."""
        raise NotImplementedError

    def eager(self) -> Tensor | None:
        """The same work operation by operation (neither compiled nor replayed from a graph), to be counted."""
        return self()

    def flops(self) -> int | None:
        """Floating-point operations of one call (a multiply-add is two); None where they cannot be counted."""
        from imagen_kit.bench.counts import count_flops

        return count_flops(self.eager) if self.countable else None

    def close(self) -> None:
        """Let go of what is held outside of Python's memory (processes, graphs, files)."""


@dataclass(frozen=True)
class Unavailable:
    """A peer that cannot be had here, and why: an entry of the row that says so.

    Args:
        reason: one plain line, such as ``k_diffusion is not installed``.
    """

    reason: str


Built = dict[str, Subject | Unavailable]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

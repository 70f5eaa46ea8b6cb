"""What every step cache is: a rule for when a network's inner part is computed, and a memory for when it is not.

Neighbouring sampling steps ask a network nearly the same question, and the deep parts of it answer nearly the same.
A cache runs the outer part of the network (the first ``depth`` blocks; of a U-Net what lies outside ``depth`` skip
connections) at every evaluation, and answers for the inner part out of its memory where its rule allows. What is
remembered is the change that the inner part makes to its input (of a U-Net, where the two differ in shape, its
answer). See ``denoisers.layers.inner`` for the seam.

A cache is immutable. All that a sampling run remembers is in the ``Run`` that ``begin`` returns, by branch (cond,
uncond, ...), so two runs never meet, and branches may come and go from one evaluation to the next. Samples are
never mixed: what is decided for one, and what it is answered, does not depend on the others of its batch.

A new cache is one file: a frozen dataclass with ``wanted`` (or, where the rule looks at nothing but the evaluation's
number and time, ``Fixed.full``), and if it needs one a ``Memory`` of its own.

Axes: b batch, m branches in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagen_kit.denoisers.layers.inner import Run as Inner
from imagen_kit.denoisers.layers.inner import Told, note, take, visiting
from imagen_kit.errors import KitError
from imagen_kit.guidance.step import Step, Times

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Turn:
    """One evaluation of a run.

    Attributes:
        number: how many were before it.
        t: its native time: a number, or a tensor where samples have grids of their own (or a loop holds its times
            on the device); such times are never read.
        place: sampling steps before it, linear in t between the steps; None where t is no number, or the
            grid is not known.
        steps: sampling steps of the run; None where the grid is not known.
        before: ``place`` of the evaluation before, None at the first.
    """

    number: int
    t: float | Tensor
    place: float | None = None
    steps: int | None = None
    before: float | None = None


@dataclass
class Memory:
    """What one branch of a run remembers.

    Attributes:
        rest: (b, ...) what the inner part made of its input; None before it was computed.
        probe: (b, ...) what the outer part was like then; see ``layers.inner.Visitor``.
        t: native time of the last evaluation that was computed.
    """

    rest: Tensor | None = None
    probe: Tensor | None = None
    t: float | Tensor | None = None

    def fits(self, probe: Tensor) -> bool:
        """Whether something is remembered, and of inputs like this one."""
        kept = self.probe
        return kept is not None and (kept.shape, kept.dtype, kept.device) == (
            probe.shape,
            probe.dtype,
            probe.device,
        )

    def recall(self, turn: Turn) -> Tensor:
        """(b, ...) what the inner part is taken to make of its input."""
        assert self.rest is not None
        return self.rest

    def keep(self, turn: Turn, wanted: Sequence[bool], rest: Tensor, probe: Tensor) -> None:
        """Remember what was computed.

        Args:
            turn: of the evaluation.
            wanted: for each sample whether it was computed.
            rest: rows of those that were.
            probe: (b, ...) of all samples.
        """
        if all(wanted):
            self.rest, self.probe = rest, probe
        else:
            assert self.rest is not None
            assert self.probe is not None
            inside, outside = spans(wanted, True), spans(wanted, False)
            self.rest = merged(wanted, rest, take(self.rest, outside))
            self.probe = merged(wanted, take(probe, inside), take(self.probe, outside))
        self.t = turn.t


@dataclass(frozen=True)
class StepCache:
    """A cache of a network's inner part; see the module.

    Attributes:
        capturable: whether a run can be captured as a CUDA graph: whether its rule does without the host's reading.
        depth: where the network is cut: blocks (of a U-Net: skip connections) that are computed at every evaluation.

    Raises:
        KitError: a depth that is not a whole number of at least 1.
    """

    capturable: ClassVar[bool] = False
    depth: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        whole(self, "depth", least=1)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return getattr(type(self), "__name__", "cache")

    def fit(self, network: Network) -> None:
        """KitError unless the network can be cut at ``depth``."""
        module = getattr(network, "_orig_mod", network)
        kind = type(module).__name__ if isinstance(module, nn.Module) else "the network"
        if module is not network or getattr(module, "_compiled_call_impl", None) is not None:
            raise KitError(
                f"a step cache goes between the blocks of {kind}: compile its blocks, not the whole"
            )
        places = getattr(module, "shares", None)
        if not places:
            raise KitError(
                f"a step cache cannot go between the blocks of {kind}: it says no places to cut it at"
            )
        if self.depth > len(places):
            raise KitError(f"cache depth {self.depth}: {kind} can be cut at 1 to {len(places)}")

    def begin(self, network: Network, times: Sequence[float] | Tensor | None = None) -> Run:
        """A memory for one sampling run: a callable with the network's signature.

        Args:
            network: what is run.
            times: the run's grid of native times, noisiest first.

        Raises:
            KitError: as ``fit``.
        """
        self.fit(network)
        return Run(self, network, times)

    def memory(self) -> Memory:
        """An empty memory for one branch."""
        return Memory()

    def wanted(self, turn: Turn, memories: Sequence[Memory], probes: Sequence[Tensor]) -> list[list[bool]]:
        """For each branch and sample whether the inner part must be computed.

        Args:
            turn: the evaluation.
            memories: one a branch; the rule may write there what it has seen.
            probes: one (b, ...) a branch.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(StepCache):
    """A cache whose rule looks at the evaluation's number and time alone: nothing is read from the device.

    A run is then the same operations every time, and can be captured as a CUDA graph. Besides what the rule says an
    evaluation is computed where nothing fitting is remembered, and where the time lies above that of the last one
    computed (as after a restart), for there a memory says nothing.
    """

    capturable: ClassVar[bool] = True

    def full(self, turn: Turn) -> bool:
        """Whether all is computed at this evaluation."""
        raise NotImplementedError

    def wanted(self, turn: Turn, memories: Sequence[Memory], probes: Sequence[Tensor]) -> list[list[bool]]:
        full = self.full(turn)
        pairs = zip(memories, probes, strict=True)
        return [
            [full or not memory.fits(probe) or rises(turn, memory)] * len(probe) for memory, probe in pairs
        ]


class Run:
    """One sampling run with a cache. ``run(x, t, ...)`` is the network's answer, or one near it.

    A loop of one's own calls it in place of the network; ``Denoise`` says besides what the rows of a call are.
    """

    def __init__(self, cache: StepCache, network: Network, times: Sequence[float] | Tensor | None = None):
        self.cache, self.network = cache, network
        self.times: Times | None = times if times is None or isinstance(times, Tensor) else tuple(times)
        self.now: Turn | None = None
        self._memories: dict[str, Memory] = {}

    def __call__(self, x: Tensor, t: Tensor, *cond: Any) -> Tensor:
        """The network's answer to (x, t) and a conditioning: one evaluation."""
        self.turn(t)
        return self.through(self.network, ("",))(x, t, *cond)

    def turn(self, t: float | Tensor) -> None:
        """The next evaluation begins, at native time t."""
        number, before = (0, None) if self.now is None else (self.now.number + 1, self.now.place)
        place = None
        if self.times is not None and not isinstance(self.times, Tensor) and not isinstance(t, Tensor):
            place = float(Step(t, 0.0, 0.0, self.times).place)
        steps = None if self.times is None else self._points - 1
        self.now = Turn(number, t, place, steps, before)

    @property
    def _points(self) -> int:
        assert self.times is not None
        return self.times.shape[-1] if isinstance(self.times, Tensor) else len(self.times)

    def through(self, network: Network, names: Sequence[str]) -> Network:
        """The network with the run's memory.

        Args:
            network: the run's, or another one (a weak one, one with layers changed).
            names: the branches that its batch holds one after another, each of as many samples.

        Returns:
            a function with the network's signature, for one call; it raises KitError for a network that does not
            come by the seam.
        """

        def call(*inputs: Any) -> Tensor:
            visit = _Visit(self, [self._memories.setdefault(name, self.cache.memory()) for name in names])
            with visiting(visit):
                out = network(*inputs)
            if not visit.seen:
                raise KitError(
                    f"cache: the blocks of {type(network).__name__} were not run where a cache can see them; "
                    "compile its blocks, not the whole"
                )
            return out

        return call


class _Visit:
    """One call of a network under a cache; a ``layers.inner.Visitor``."""

    def __init__(self, run: Run, memories: list[Memory]):
        self.run, self.memories = run, memories
        self.place, self.skipped, self.seen = run.cache.depth, False, False

    def __call__(self, run: Inner, x: Tensor, told: Told, base: Tensor | None, probe: Tensor) -> Tensor:
        turn = self.run.now
        assert turn is not None
        self.seen = True
        probe = probe.detach()
        wanted = self.run.cache.wanted(turn, self.memories, probe.chunk(len(self.memories)))
        rows = [row for branch in wanted for row in branch]
        note(self.run.network, len(rows), rows.count(False), self.place)
        if all(rows):
            y = run(x, *told)
            self._keep(turn, wanted, y if base is None else y - base, probe)
            return y
        self.skipped = True
        left = spans(rows, False)
        pairs = [(m, spans(b, False)) for m, b in zip(self.memories, wanted, strict=True) if not all(b)]
        guess = _joined([take(memory.recall(turn), outside) for memory, outside in pairs])
        guess = guess if base is None else take(base, left) + guess
        if not any(rows):
            return guess
        inside = spans(rows, True)
        fresh = run(take(x, inside), *take(told, inside))
        self._keep(turn, wanted, fresh if base is None else fresh - take(base, inside), probe)
        return merged(rows, fresh, guess)

    def _keep(self, turn: Turn, wanted: list[list[bool]], rest: Tensor, probe: Tensor) -> None:
        """Split what was computed by branch, and remember it."""
        parts = rest.detach().split([sum(branch) for branch in wanted])
        probes = probe.chunk(len(self.memories))
        for memory, branch, part, own in zip(self.memories, wanted, parts, probes, strict=True):
            if any(branch):
                memory.keep(turn, branch, part, own)


def rises(turn: Turn, memory: Memory) -> bool:
    """Whether the time lies above that of the last evaluation computed, as far as numbers tell."""
    if memory.t is None or isinstance(turn.t, Tensor) or isinstance(memory.t, Tensor):
        return False
    return turn.t > memory.t


def spans(flags: Sequence[bool], which: bool) -> list[slice]:
    """The stretches of samples with this flag."""
    out: list[slice] = []
    for i, flag in enumerate(flags):
        if flag != which:
            continue
        if out and out[-1].stop == i:
            out[-1] = slice(out[-1].start, i + 1)
        else:
            out.append(slice(i, i + 1))
    return out


def merged(flags: Sequence[bool], yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where the flag is set, and those of ``no`` where it is not, in the flags' order."""
    parts = [(part.start, part.stop - part.start, yes) for part in spans(flags, True)]
    parts += [(part.start, part.stop - part.start, no) for part in spans(flags, False)]
    used = {id(yes): 0, id(no): 0}
    out = []
    for _, count, source in sorted(parts, key=lambda part: part[0]):
        start = used[id(source)]
        out.append(source[start : start + count])
        used[id(source)] = start + count
    return torch.cat(out)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build(spec: StepCache | Mapping[str, Any] | str | None) -> StepCache | None:
    """A cache from itself, from a name or from ``{"name": ..., **options}``; None for none.

    Raises:
        KitError: anything else.
    """
    from imagen_kit.caches import create

    if spec is None or isinstance(spec, StepCache):
        return spec
    if isinstance(spec, str):
        return create(spec)
    if isinstance(spec, Mapping) and "name" in spec:
        return create(spec["name"], **{key: value for key, value in spec.items() if key != "name"})
    raise KitError(f"a cache must be a name, a mapping with 'name' or a cache, got {spec!r}")


def whole(owner: Any, name: str, least: int) -> None:
    """KitError unless the option is a whole number of at least ``least``."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise KitError(f"cache {name} must be a whole number of at least {least}, got {value!r}")

"""Where a network's outer part ends and its inner part begins: the seam at which step caches work.

A denoiser runs a few blocks (its outer part), then the rest (the inner part), then its head. From one sampling step
to the next the inner part's answer changes little, so a cache may answer in its place. A network takes part by
running its blocks through ``run_blocks`` (one after another) or ``inner`` (nested, as in a U-Net, where the outer
part also comes after the inner one), and by saying in ``shares`` where it can be cut: ``shares[k - 1]`` is the share of
its blocks that lies inside place k.

Places are counted from 1, the outermost: at place k of a sequence k blocks are outside, at place k of a U-Net k skip
connections. Nothing else in a network knows of caches, and a network that no cache watches runs as if this were not
here.

Axes: b batch, n tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor

#: What an inner part is told besides its input: tensors with a row a sample, None, or tuples and lists of these.
Told = tuple[Any, ...]
Run = Callable[..., Tensor]


class Visitor(Protocol):
    """Who answers for the inner part during a call.

    Attributes:
        place: where it cuts the network.
        skipped: whether it has left the inner part out for some sample, and with it the layers in there.
    """

    place: int
    skipped: bool

    def __call__(self, run: Run, x: Tensor, told: Told, base: Tensor | None, probe: Tensor) -> Tensor:
        """What ``run(x, *told)`` answers, or something near it.

        Args:
            run: the inner part. ``run(x[rows], *take(told, rows))`` answers for some of the samples.
            x: (b, ...) its input.
            told: what else it is given.
            base: what its answer is a change of, of the answer's shape (b, ...); None: of nothing.
            probe: (b, ...) how much it differs from step to step says how much the answer will.
        """


_visitors: dict[int, Visitor] = {}  # by thread


@contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """Inside the block ``visitor`` answers for the inner part of whatever network this thread calls."""
    thread = get_ident()
    before = _visitors.get(thread)
    _visitors[thread] = visitor
    try:
        yield
    finally:
        _visitors.pop(thread)
        if before is not None:
            _visitors[thread] = before


def visitor() -> Visitor | None:
    """Who visits this thread's calls. Nobody visits a network that is compiled as a whole."""
    if torch.compiler.is_compiling() or not _visitors:
        return None
    return _visitors.get(get_ident())


def place(last: int) -> int:
    """Where this thread's visitor cuts the network; ``last``, the innermost place, where nobody does."""
    found = visitor()
    return last if found is None else min(found.place, last)


def inner(run: Run, x: Tensor, told: Told, base: Tensor | None = None) -> Tensor:
    """``run(x, *told)``, the part of a network inside ``place``; a visitor may answer for it.

    Args:
        run, x, told, base: see ``Visitor``; the probe is ``x``.
    """
    found = visitor()
    return run(x, *told) if found is None else found(run, x, told, base, x)


def run_blocks(block: Callable[..., Tensor], count: int, x: Tensor, told: Told, start: int = 0) -> Tensor:
    """``x = block(i, x, *told)`` for i = 0 … count - 1: tokens (b, n, d) → (b, n - start, d).

    Args:
        block: the blocks by number.
        count: how many there are.
        x: (b, n, d) tokens.
        told: see ``Told``.
        start: the first token that is read afterwards.
    """
    found, outside, first = visitor(), place(count), x
    for i in range(outside):
        x = block(i, x, *told)
    if found is None:
        return x[:, start:]

    def rest(x: Tensor, *told: Any) -> Tensor:
        for i in range(outside, count):
            x = block(i, x, *told)
        return x[:, start:]

    base = x[:, start:]
    return found(rest, x, told, base, base - first[:, start:])


@dataclass
class Count:
    """What the visitors of a network computed, in evaluations of one sample.

    Attributes:
        asked: how many they were asked for.
        left_out: for how many the inner part was left out.
        blocks: how many whole evaluations those are worth, counted in blocks.
    """

    asked: int = 0
    left_out: int = 0
    blocks: float = 0.0

    @property
    def saved(self) -> float:
        """The share of all blocks that was left out; 0 where no visitor was asked."""
        return self.blocks / self.asked if self.asked else 0.0


_counts: dict[int, list[tuple[Any, Count]]] = {}  # by thread


@contextmanager
def counting(network: Any = None) -> Iterator[Count]:
    """Counts what visitors do inside the block in calls of this thread: in runs of ``network``, None for any."""
    mine, entry = _counts.setdefault(get_ident(), []), (network, Count())
    mine.append(entry)
    try:
        yield entry[1]
    finally:
        mine.remove(entry)
        if not mine:
            _counts.pop(get_ident(), None)


def note(network: Any, asked: int, left_out: int, place: int) -> None:
    """For ``counting``: of so many samples so many were left out, of a run of ``network`` cut at ``place``."""
    for wanted, count in _counts.get(get_ident(), ()):
        if wanted is None or wanted is network:
            count.asked += asked
            count.left_out += left_out
            count.blocks += left_out * network.shares[place - 1]


def shares(count: int) -> list[float]:
    """Of ``count`` blocks one after another, the share that lies inside each place."""
    return [1 - k / count for k in range(1, count)]


def take(value: Any, rows: list[slice]) -> Any:
    """The samples in ``rows`` of every tensor in ``value``, which is like ``Told``; equal tensors are cut once."""
    done: dict[int, Tensor] = {}

    def cut(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, tuple | list):
            return type(part)(cut(each) for each in part)
        if id(part) not in done:
            done[id(part)] = part[rows[0]] if len(rows) == 1 else torch.cat([part[row] for row in rows])
        return done[id(part)]

    return cut(value)

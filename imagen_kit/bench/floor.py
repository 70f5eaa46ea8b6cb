"""The least memory that a piece of work needs besides its weights, from the operations that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class _Life:
    """A piece of memory: its size, the operations between which it is needed."""

    bytes: int
    born: int
    read: int


@dataclass(frozen=True)
class Floor:
    """What the operations of some work need.

    Attributes:
        largest: bytes of the largest activation: the most that one operation reads and writes, weights left out.
        operation: which.
        alive: bytes of the fullest moment: everything that was made by then and is still to be read, were it
            freed at once after its last use. In this order of operations nobody needs less, unless operations are
            fused or done again.
    """

    largest: int
    operation: str
    alive: int


@dataclass(frozen=True)
class Needed:
    """A measured peak beside the least; everything in bytes.

    Attributes:
        weights, inputs: held before the call.
        largest, operation, alive: see ``Floor``. Inputs that are read are part of them.
        peak: weights, inputs, and the most that the call held besides; see ``imagen_kit.bench.memory``.
        process: the same where the C library keeps freed memory as it pleases; None where it was not looked at.
    """

    weights: int
    inputs: int
    largest: int
    operation: str
    alive: int
    peak: int
    process: int | None = None

    @property
    def over_alive(self) -> float:
        """The peak over the weights and what is alive at once: 1 is what this order of operations needs."""
        return self.peak / (self.weights + self.alive)

    @property
    def over_largest(self) -> float:
        """The peak over the weights and the largest activation.

        That leaves out what waits for its turn beside the operation (skip connections, the guided step's state),
        so it may be above 1 where nothing could be freed.
        """
        return self.peak / (self.weights + self.largest)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a row; both ratios among them."""
        return {**asdict(self), "over_alive": self.over_alive, "over_largest": self.over_largest}


class Lives(TorchDispatchMode):
    """Follows the memory of every tensor through the operations inside the ``with`` block.

    Args:
        device: whose memory counts.
        weights: left out.
    """

    def __init__(self, device: torch.device, weights: Iterable[Tensor]):
        super().__init__()
        self._device = device.type
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._now: dict[int, _Life] = {}  # by address, which a later piece of memory may have again
        self._past: list[_Life] = []
        self._count, self._largest, self._operation = 0, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count += 1
        given, made = self._pieces((args, kwargs)), self._pieces(out)
        for address, size in given.items():
            life = self._now.setdefault(address, _Life(size, 0, 0))  # from before the block
            life.read = self._count
        for address, size in made.items():
            if (
                address not in given
            ):  # not a view, nor written in place: new, also where an old address comes again
                if address in self._now:
                    self._past.append(self._now[address])
                self._now[address] = _Life(size, self._count, self._count)
        touched = sum({**given, **made}.values())
        if touched > self._largest:
            self._largest, self._operation = touched, func.name().removeprefix("aten::").split(".")[0]
        return out

    def _pieces(self, value: Any) -> dict[int, int]:
        """Address → bytes of the memory behind the tensors in ``value``; a library's own layouts are weights."""
        found = {}
        for item in tree_leaves(value):
            if isinstance(item, Tensor) and item.device.type == self._device and item.layout is torch.strided:
                storage = item.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self._left_out:
                    found[storage.data_ptr()] = storage.nbytes()
        return found

    @property
    def floor(self) -> Floor:
        """Of the operations so far."""
        change = [0] * (self._count + 2)
        for life in (*self._past, *self._now.values()):
            change[life.born] += life.bytes
            change[life.read + 1] -= life.bytes
        alive = most = 0
        for step in change:
            alive += step
            most = max(most, alive)
        return Floor(self._largest, self._operation, most)


def measure(work: Callable[[], Any], device: torch.device, weights: Iterable[Tensor]) -> Floor:
    """The floor of one call of ``work``, done operation by operation."""
    with Lives(device, weights) as lives:
        work()
    return lives.floor

"""Blocks of a network whose weights come when they are needed and go when they have been used.

A stack of blocks runs in the memory of two: while block i computes, a thread brings block i + 1. On a GPU the copies
run beside the computation, on a stream of their own and out of pinned memory. The numbers are those of the network
held whole: the same weights meet the same operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ALIGNED = 256  # bytes; where a tensor may begin in a buffer: kernels load whole vectors


class Source(Protocol):
    """Where weights come from, one tensor at a time; a ``checkpoints`` source is one."""

    def get(self, name: str) -> Tensor:
        """The tensor, in the dtype it is stored in."""
        ...

    def release(self, name: str) -> None:
        """The tensor has been copied: its memory may go."""
        ...


@dataclass(frozen=True)
class _Weight:
    """A parameter of a block: the module it belongs to, its names there and in the source, its place."""

    owner: nn.Module
    leaf: str
    key: str
    begin: int
    empty: nn.Parameter

    def view(self, flat: Tensor) -> Tensor:
        """Its place in a buffer of bytes, laid out as the parameter was (channels-last stays so)."""
        size = self.empty.numel() * self.empty.dtype.itemsize
        row = flat[self.begin : self.begin + size].view(self.empty.dtype)
        return row.as_strided(self.empty.shape, self.empty.stride())

    def set(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.leaf] = parameter


class _Slot:
    """Room for the weights of one block on the device, and on a GPU the events that guard it."""

    def __init__(self, size: int, device: torch.device, staged: bool):
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.coming: Future[None] | None = None
        cuda = device.type == "cuda"
        self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True) if cuda and staged else None
        self.copied = torch.cuda.Event() if cuda else None
        self.used = torch.cuda.Event() if cuda else None

    def ready(self) -> None:
        """Wait until its weights are there: the thread here, the device's stream there."""
        if self.coming is not None:
            self.coming.result()
            self.coming = None
        if self.copied is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(self.copied)


class Streamer:
    """Runs ``blocks`` with weights out of ``source``; the blocks' parameters are on the meta device otherwise.

    A block may also be called in parts (one of its layers alone): it is then fetched for that call.

    Args:
        blocks: modules that are called one after the other, none inside another.
        source: of the weights.
        prefixes: what comes before a parameter's name in the source, one a block.
        device: where the blocks run.
        dtype: of their floating parameters there; None keeps each parameter's.
        cyclic: after the last block comes the first again (a denoiser); otherwise the room is given back then
            (an encoder).
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        source: Source,
        prefixes: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cyclic: bool = False,
    ):
        self.source, self.cyclic = source, cyclic
        self.device = torch.device(device)
        self._plans = [_plan(block, at, dtype) for block, at in zip(blocks, prefixes, strict=True)]
        self._size = max((end for _, end in self._plans), default=0)
        self._slots: list[_Slot] = []
        self._side: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._inside: int | None = None
        self._entered: nn.Module | None = None
        self._handles: list[Any] = []
        for index, block in enumerate(blocks):
            self._empty(index)
            for module in _callable(block):
                self._handles += [
                    module.register_forward_pre_hook(partial(self._enter, index)),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    @property
    def room(self) -> int:
        """Bytes on the device for the blocks' weights while they run."""
        return 2 * self._size

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        """Block ``index`` is about to run, or ``module`` of it alone."""
        if self._inside is not None:
            return  # a layer of the block that runs
        slot = self._slot_of(index)
        slot.ready()
        for weight in self._plans[index][0]:
            weight.set(nn.Parameter(weight.view(slot.flat), requires_grad=False))
        self._inside, self._entered = index, module
        last = index == len(self._plans) - 1
        if len(self._plans) > 1 and (self.cyclic or not last):
            other = self._slots[1] if slot is self._slots[0] else self._slots[0]
            self._fetch(0 if last else index + 1, other)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """``module`` has run, or raised."""
        if module is not self._entered or self._inside is None:
            return
        index, self._inside, self._entered = self._inside, None, None
        self._empty(index)
        slot = next(slot for slot in self._slots if slot.block == index)
        if slot.used is not None:
            slot.used.record(torch.cuda.current_stream(self.device))
        if index == len(self._plans) - 1 and not self.cyclic:
            self.free()

    def free(self) -> None:
        """Give the room on the device back; it is taken again when a block runs."""
        for slot in self._slots:
            if slot.coming is not None:
                slot.coming.result()
        if self._side is not None:
            self._side.synchronize()
        if self._worker is not None:
            self._worker.shutdown()
        self._slots, self._worker, self._side = [], None, None

    def close(self) -> None:
        """Free, and let the blocks go; their parameters stay on the meta device."""
        self.free()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _slot_of(self, index: int) -> _Slot:
        """The slot that holds, or is getting, block ``index``."""
        if not self._slots:
            staged = not isinstance(self.source, Packed)
            self._slots = [_Slot(self._size, self.device, staged) for _ in range(2)]
            self._worker = ThreadPoolExecutor(1, "weights")
            if self.device.type == "cuda":
                self._side = torch.cuda.Stream(self.device)
                # The room may have been something else's until now, whose last use is still to come.
                self._side.wait_stream(torch.cuda.current_stream(self.device))
        for slot in self._slots:
            if slot.block == index:
                return slot
        for slot in self._slots:
            if slot.coming is not None:  # fetched for nothing: the blocks ran in another order
                slot.coming.result()
        self._fetch(index, self._slots[0])
        return self._slots[0]

    def _fetch(self, index: int, slot: _Slot) -> None:
        if slot.block != index:
            assert self._worker is not None
            if slot.coming is not None:
                slot.coming.result()
            slot.block = index
            slot.coming = self._worker.submit(self._bring, index, slot)

    @torch.no_grad()
    def _bring(self, index: int, slot: _Slot) -> None:
        """Weights of block ``index`` into ``slot``; runs in the thread."""
        end = self._plans[index][1]
        if slot.copied is None:
            self._copy(index, slot.flat)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            flat = slot.staging
            if flat is None:
                flat = self.source.flat(index)  # type: ignore[attr-defined]
            else:
                slot.copied.synchronize()  # what was staged before has gone
                self._copy(index, flat)
            assert slot.used is not None
            self._side.wait_event(slot.used)
            slot.flat[:end].copy_(flat[:end], non_blocking=True)
            slot.copied.record(self._side)

    def _copy(self, index: int, flat: Tensor) -> None:
        weights, end = self._plans[index]
        if isinstance(self.source, Packed):
            flat[:end].copy_(self.source.flat(index)[:end])
            return
        for weight in weights:
            weight.view(flat).copy_(self.source.get(weight.key))
            self.source.release(weight.key)

    def _empty(self, index: int) -> None:
        for weight in self._plans[index][0]:
            weight.set(weight.empty)


class Packed:
    """Weights of blocks in main memory, each block's one piece, pinned for a GPU: one copy brings it there.

    Args:
        blocks: with their weights, which are copied.
        pin: use pinned memory.
    """

    def __init__(self, blocks: Sequence[nn.Module], pin: bool = False):
        self._flats = []
        for block in blocks:
            held = dict(block.named_parameters())
            weights, end = _plan(block, "", None)
            flat = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
            for weight in weights:
                weight.view(flat).copy_(held[weight.key].detach())
            self._flats.append(flat)

    def flat(self, index: int) -> Tensor:
        """(bytes,) uint8 of a block."""
        return self._flats[index]

    def get(self, name: str) -> Tensor:
        raise KeyError(name)  # packed weights are fetched by the block

    def release(self, name: str) -> None:
        """Nothing: they stay."""


class Streamed(nn.Module):
    """Blocks that are streamed, in place of the module list that they were; iterating gives the blocks.

    They are not among the parameters of what holds them: ``to`` changes where, and in which dtype, they run.

    Args:
        blocks: on the meta device.
        source: of their weights.
        prefixes: see ``Streamer``.
        dtype: in which they run.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], source: Source, prefixes: Sequence[str], dtype: torch.dtype
    ):
        super().__init__()
        self._blocks = tuple(blocks)
        self._source, self._prefixes = source, list(prefixes)
        self._where: tuple[torch.device, torch.dtype] = (torch.device("cpu"), dtype)
        self._stream()

    def _stream(self) -> None:
        device, dtype = self._where
        self.streamer = Streamer(self._blocks, self._source, self._prefixes, device=device, dtype=dtype)

    def __iter__(self) -> Any:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self._blocks[index]

    def _apply(self, fn: Any, recurse: bool = True) -> Streamed:
        probe = fn(torch.empty(0, device=self._where[0], dtype=self._where[1]))
        if (probe.device, probe.dtype) != self._where and probe.device.type != "meta":
            self.streamer.close()
            self._where = (probe.device, probe.dtype)
            self._stream()
        return super()._apply(fn, recurse)


def repeated(module: nn.Module) -> Mapping[str, nn.Module]:
    """The blocks that a network is stacked of: entries of its module lists that hold parameters, by name.

    Of lists in lists the innermost, of blocks in blocks the outermost.
    """
    found: dict[str, nn.Module] = {}

    def search(here: nn.Module, path: str, listed: bool) -> None:
        for name, child in here.named_children():
            place = f"{path}{name}"
            inside = listed or isinstance(here, nn.ModuleList)
            if isinstance(child, nn.ModuleList):
                search(child, f"{place}.", True)
            elif inside and isinstance(here, nn.ModuleList):
                if next(child.parameters(), None) is not None:
                    found[place] = child
            else:
                search(child, f"{place}.", False)

    search(module, "", False)
    return found


def _callable(block: nn.Module) -> list[nn.Module]:
    """The block and its modules with parameters of their own."""
    layers = [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]
    return [block, *(m for m in layers if m is not block)]


def _plan(block: nn.Module, prefix: str, dtype: torch.dtype | None) -> tuple[list[_Weight], int]:
    """The weights of a block and the bytes that they take together."""
    weights, end = [], 0
    for path, owner in block.named_modules():
        for leaf, held in owner.named_parameters(recurse=False):
            kind = dtype if dtype is not None and held.is_floating_point() else held.dtype
            empty = nn.Parameter(torch.empty_like(held, dtype=kind, device="meta"), requires_grad=False)
            key = f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}"
            weights.append(_Weight(owner, leaf, key, end, empty))
            end += -(-held.numel() * kind.itemsize // _ALIGNED) * _ALIGNED
    return weights, end

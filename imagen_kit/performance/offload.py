"""Parts of a pipeline that have memory only while they work: encode, then free; one stage after the other.

    none     every part stays where it was put
    model    a part is on the device during its turn; between turns a GPU's parts wait in main memory, and on the CPU
             the parts of a recipe wait in their files
    layers   as ``model``; on a GPU the blocks of a denoiser also come one by one, each while the one before it works

The numbers are those of ``none``: the same weights meet the same operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError, unknown
from imagen_kit.performance.streaming import Packed, Streamer, repeated
from imagen_kit.text_encoders.base import TextEncoder

MODES = ("none", "model", "layers")
Make = Callable[[], nn.Module]


class Shelf(Protocol):
    """Where a module's weights wait."""

    def take(self) -> None:
        """The module's turn begins: its weights are on the device."""
        ...

    def put(self) -> None:
        """Its turn is over: they have left it."""
        ...


class Offload:
    """Keeps the weights of modules off the device but for their turns.

    Args:
        mode: ``model`` or ``layers``.
        device: where the modules work.

    Raises:
        KitError: an unknown mode.
    """

    def __init__(self, mode: str, device: torch.device | str):
        if mode not in MODES[1:]:
            raise KitError(unknown("offload", mode, MODES))
        self.mode, self.device = mode, torch.device(device)
        self._shelves: dict[int, Shelf] = {}
        self._modules: dict[int, nn.Module] = {}
        self._open: dict[int, int] = {}

    def adopt(self, module: Any, make: Make | None = None, stacked: bool = False) -> None:
        """Take the weights of ``module`` away until its turn.

        Args:
            module: the only owner of its weights; what is no module has none, and nothing is done.
            make: makes the same module anew with its weights. On the CPU these are got back so: without it they
                stay, for there is no other place. On a GPU they wait in main memory, and it is not used.
            stacked: the module runs many times in a turn, so that ``layers`` brings its blocks one by one.
        """
        if id(module) in self._shelves or not isinstance(module, nn.Module) or not _tensors(module):
            return
        shelf: Shelf
        if self.device.type == "cpu":
            if make is None:
                return
            shelf = Remade(module, make)
        else:
            shelf = Carried(module, self.device, stacked and self.mode == "layers")
        self._shelves[id(module)] = shelf
        self._modules[id(module)] = module

    @contextlib.contextmanager
    def turn(self, *modules: Any) -> Iterator[None]:
        """A block of code in which ``modules`` have their weights on the device; such blocks may nest."""
        mine = [id(module) for module in modules if id(module) in self._shelves]
        taken: list[int] = []
        try:
            for key in mine:
                if not self._open.get(key):
                    self._shelves[key].take()
                self._open[key] = self._open.get(key, 0) + 1
                taken.append(key)
            yield
        finally:
            for key in reversed(taken):
                self._open[key] -= 1
                if not self._open[key]:
                    self._shelves[key].put()


class Remade:
    """A module whose weights are made anew, as a rule mapped from their file, whenever its turn comes."""

    def __init__(self, module: nn.Module, make: Make):
        self.module, self.make = module, make
        self.put()

    def take(self) -> None:
        fresh = self.make()
        _fill(self.module, _tensors(fresh))
        _empty(fresh)  # or what refers to itself in it would hold the weights beyond their turn

    def put(self) -> None:
        _empty(self.module)


class Carried:
    """A module whose weights wait in main memory, pinned for a GPU, and are copied to the device for its turn.

    Args:
        module: anywhere; its weights are moved to main memory.
        device: where it works.
        by_blocks: bring its repeated blocks one by one, and only the rest for the whole turn.
    """

    def __init__(self, module: nn.Module, device: torch.device, by_blocks: bool = False):
        self.module, self.device = module, device
        self.pin = device.type == "cuda"
        blocks = list(repeated(module).values()) if by_blocks else []
        self.streamer: Streamer | None = None
        if blocks:
            packed = Packed(blocks, self.pin)
            self.streamer = Streamer(blocks, packed, [""] * len(blocks), device=device, cyclic=True)
        self.home = {
            name: self._waiting(tensor) for name, tensor in _tensors(module).items() if not tensor.is_meta
        }
        self.put()

    def take(self) -> None:
        _fill(self.module, {n: t.to(self.device, non_blocking=self.pin) for n, t in self.home.items()})

    def put(self) -> None:
        if self.streamer is not None:
            self.streamer.free()
        _fill(self.module, self.home)

    def _waiting(self, tensor: Tensor) -> Tensor:
        there = tensor.detach().to("cpu")
        # Weights that torchao packed are not memory that could be pinned.
        return there.pin_memory() if self.pin and type(there) is Tensor else there


def keep_off(encoder: Any, offload: Offload, makes: list[Make] | None = None) -> None:
    """Give a text encoder its weights only while it encodes prompts that it does not remember.

    Args:
        encoder: a ``TextEncoder``; of several in one, each has a turn of its own.
        offload: who keeps them.
        makes: make the network of the encoder, or of each of its parts, anew; see ``Offload.adopt``.
    """
    if not isinstance(encoder, nn.Module):
        return
    remade = dict(zip(map(id, getattr(encoder, "parts", [encoder])), makes or [], strict=False))
    for part in encoder.modules():
        if not isinstance(part, TextEncoder):
            continue
        network = getattr(part, "network", None)
        if isinstance(network, nn.Module):
            offload.adopt(network, remade.get(id(part)))
            part.working = partial(offload.turn, network)
        part._anchor = part._anchor.to(offload.device)  # embeddings are wanted there


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, one that is shared under each of its names."""
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name: tensor.detach() for name, tensor in named}


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put other tensors in the place of parameters and buffers; a shared one stays shared."""
    same: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        held = owner._parameters.get(leaf)
        if held is None:
            owner._buffers[leaf] = tensor
            continue
        fresh = nn.Parameter(tensor, requires_grad=held.requires_grad)
        owner._parameters[leaf] = same.setdefault(id(held), fresh)


def _empty(module: nn.Module) -> None:
    _fill(module, {name: torch.empty_like(t, device="meta") for name, t in _tensors(module).items()})

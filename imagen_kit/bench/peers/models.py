"""Peers of one network: who there is, their models, and how they are run.

diffusers' model is there once and run twice, as it is and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers import imagen_pytorch, networks
from imagen_kit.bench.subject import Unavailable
from imagen_kit.bench.work import TORCH, Told, Way, attempt

COMPILED = "diffusers compiled"
PEERS = ("diffusers", COMPILED, "imagen_pytorch")


@dataclass
class Peer:
    """A peer's model.

    Attributes:
        model: theirs.
        network: ours that it stands beside.
        compiled: run it through torch.compile, whole, as its documentation tells.
        same: whether it computes the same as ours.
        note: what it is, in words.
    """

    model: nn.Module
    network: nn.Module
    compiled: bool = False
    same: bool = True
    note: str = ""

    def prepare(self, way: Way) -> None:
        """Bring it into a way's precision and memory format."""
        self.model.to(dtype=TORCH[way.dtype])
        if way.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        words = [type(self.model).__name__, way.dtype, *(["channels_last"] if way.channels_last else [])]
        self.note = ", ".join(
            [*words, *(["torch.compile"] if self.compiled else []), *filter(None, [self.note])]
        )

    def call(self, told: Told) -> Callable[..., Tensor]:
        """The model on these inputs, (b, c, h, w); it may be handed what to run in its place."""
        if self.same:
            return networks.call(self.model, told, self.network)
        return imagen_pytorch.call(self.model, told)

    @property
    def run_by(self) -> Any:
        """The model as it is to be run."""
        return torch.compile(self.model) if self.compiled else self.model


def beside(wanted: Sequence[str], network: nn.Module, side: int) -> dict[str, Peer | Unavailable]:
    """The peers of a network, with copies of its weights where they can hold them, float32 on its device.

    A network that no model of diffusers can be has no such peer; imagen-pytorch's is left out, without a word,
    where it would not be like ours. ``side`` is that of x.
    """
    out: dict[str, Peer | Unavailable] = {}
    if "diffusers" in wanted or COMPILED in wanted:
        found = attempt(lambda: networks.twin(network, side))
        for who in ("diffusers", COMPILED):
            if who in wanted:
                out[who] = found if isinstance(found, Unavailable) else Peer(found, network, who == COMPILED)
    if "imagen_pytorch" in wanted and imagen_pytorch.comparable(network):
        found = attempt(lambda: imagen_pytorch.neighbour(network))
        if not isinstance(found, Unavailable):
            out["imagen_pytorch"] = Peer(found, network, same=False, note=_size(found, network))
        else:
            out["imagen_pytorch"] = found
    return out


def _size(model: nn.Module, network: nn.Module) -> str:
    theirs, ours = (sum(p.numel() for p in module.parameters()) / 1e6 for module in (model, network))
    return f"another network, of {theirs:.1f} M parameters (ours {ours:.1f} M), so no difference is told"

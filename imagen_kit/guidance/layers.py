"""Networks with chosen layers changed for chosen samples: what perturbed guidance evaluates.

A layer says what may be done to it: ``is_self_attention = True`` marks a module with one self-attention of the
picture, computed by ``imagen_kit.attention``; ``is_residual = True`` one that adds something to its first
argument, so that leaving it out is the identity. A network of one's own is marked on its classes or objects.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from imagen_kit.attention import own_values
from imagen_kit.denoisers.layers.inner import visitor
from imagen_kit.errors import KitError, nearest
from imagen_kit.guidance.base import Branch, Guidance, Network, Step, number

MARKS = {"attention": "is_self_attention", "block": "is_residual"}


@dataclass(frozen=True)
class Change:
    """Maps a network to itself with layers changed; ``Branch.through`` of perturbed guidance.

    Attributes:
        who: the strategy, for messages.
        kind: ``attention``: the maps of self-attention layers are the identity; ``block``: blocks are
            skipped.
        layers: names of layers or of modules that hold them, shell patterns of either, or places among all
            layers of the kind, counted from 0 in the order of the network's modules (negative from the end).
    """

    who: str
    kind: str
    layers: tuple[str | int, ...]

    def __call__(self, network: Network) -> Network:
        return self.rows(network, slice(None))

    def rows(self, network: Network, part: slice) -> Network:
        """The network with the layers changed for a part of the batch."""
        if isinstance(network, Changed):
            return Changed(network.module, (*network.changes, (self, part)))
        return Changed(self.module_of(network), ((self, part),))

    def module_of(self, network: Network) -> nn.Module:
        """The network as a module with hooks: of a compiled one, what it was compiled from."""
        module = getattr(network, "_orig_mod", network)
        if not isinstance(module, nn.Module):
            raise KitError(f"guidance {self.who} changes layers, so the network must be a torch module")
        return module

    def choose(self, module: nn.Module) -> dict[str, nn.Module]:
        """The chosen layers by name.

        Raises:
            KitError: a network without such layers; a name or place that none has, with the nearest.
        """
        mark = MARKS[self.kind]
        every = {name: part for name, part in module.named_modules() if getattr(part, mark, False)}
        if not every:
            raise KitError(
                f"guidance {self.who}: {type(module).__name__} has no layer marked {mark} = True to change"
            )
        names = list(every)
        chosen: dict[str, nn.Module] = {}
        for layer in self.layers:
            if isinstance(layer, int):
                if not -len(names) <= layer < len(names):
                    raise KitError(
                        f"guidance {self.who}: there is no layer {layer}; "
                        f"{type(module).__name__} has {len(names)}, 0 ({names[0]}) to {len(names) - 1} ({names[-1]})"
                    )
                found = [names[layer]]
            else:
                found = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in (layer, f"{layer}.*"))]
            if not found:
                holders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
                near = nearest(layer, [*names, *sorted(holders)])
                raise KitError(
                    f"guidance {self.who}: unknown {self.kind} layer {layer!r}; "
                    + (f"did you mean {near!r}?" if near else f"choose from {', '.join(names)}")
                )
            chosen.update({name: every[name] for name in found})
        return chosen

    @contextmanager
    def applied(self, module: nn.Module, part: slice) -> Iterator[None]:
        """The layers changed inside the block, for calls of this thread.

        Raises:
            KitError: afterwards, a layer that took no part in the calls.
        """
        waiting = dict(self.choose(module))
        with ExitStack() as stack:
            install = _attention if self.kind == "attention" else _skip
            for name, layer in waiting.copy().items():
                install(stack, layer, part, partial(waiting.pop, name, None))
            yield
        found = visitor()
        if found is not None and found.skipped:  # a step cache answered for the layers
            return
        if waiting:  # not part of this call, or compiled in a way that passes the hooks by
            raise KitError(
                f"guidance {self.who}: layer {next(iter(waiting))!r} could not be changed; it must take part in "
                "the call, compute its attention by imagen_kit.attention, and not be compiled in place"
            )


class Changed:
    """A module whose calls see some layers changed for parts of the batch."""

    def __init__(self, module: nn.Module, changes: tuple[tuple[Change, slice], ...]):
        self.module, self.changes = module, changes

    def __call__(self, *inputs: Any) -> Tensor:
        with ExitStack() as stack:
            for change, part in self.changes:
                stack.enter_context(change.applied(self.module, part))
            return self.module(*inputs)


def _attention(stack: ExitStack, layer: nn.Module, part: slice, done: Callable[[], object]) -> None:
    """Until the stack closes, the layer's attention maps are the identity for a part of the batch."""
    thread, inner = get_ident(), stack.enter_context(ExitStack())
    owns = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if get_ident() == thread:  # another thread may be calling the same network
            owns.append(inner.enter_context(own_values(part)))

    def leave(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if get_ident() == thread:
            inner.close()
            if owns.pop().calls:
                done()

    stack.callback(layer.register_forward_pre_hook(enter).remove)
    stack.callback(layer.register_forward_hook(leave).remove)


def _skip(stack: ExitStack, layer: nn.Module, part: slice, done: Callable[[], object]) -> None:
    """Until the stack closes, the layer answers its own first argument for a part of the batch."""
    thread = get_ident()

    def replaced(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if get_ident() != thread:
            return None
        done()
        start, stop, _ = part.indices(len(output))
        return torch.cat([output[:start], inputs[0][start:stop], output[stop:]])

    stack.callback(layer.register_forward_hook(replaced).remove)


@dataclass(frozen=True)
class LayerGuidance(Guidance):
    """cond + scale·(cond − changed), changed being the network with some layers changed; see ``Change``."""

    layers: Sequence[str | int] | str | int
    scale: float = 1.0
    cond: str = "cond"
    neutral = 0.0
    who: ClassVar[str]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        number(self.scale, f"{self.who} scale")
        object.__setattr__(self, "layers", check_layers(self.layers, self.who))

    @property
    def change(self) -> Change:
        """What is done to the network."""
        return Change(self.who, self.kind, self.layers)  # type: ignore[arg-type]

    @property
    def branch(self) -> Branch:
        """The prediction of the changed network."""
        name = f"{self.who}.{self.cond}.{','.join(map(str, self.change.layers))}"
        return Branch(name, self.cond, through=self.change)

    @property
    def needs(self) -> tuple[Branch, ...]:
        return (self.branch,) if self.scale else ()

    def active(self, step: Step) -> bool:
        return self.scale != 0

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return guided + self.scale * (predictions["cond"] - predictions[self.branch.name])

    def fit(self, network: Network) -> None:
        self.change.choose(self.change.module_of(network))

    def with_scale(self, scale: float) -> Self:
        return replace(self, scale=scale)


def check_layers(layers: Any, who: str) -> tuple[str | int, ...]:
    """Names and whole numbers as a tuple; KitError unless there is at least one."""
    single = [layers] if isinstance(layers, str | int) else layers
    fine = isinstance(single, Sequence) and all(
        isinstance(layer, str | int) and not isinstance(layer, bool) and layer != "" for layer in single
    )
    if not fine or not single:
        raise KitError(f"{who} layers must be a list of layer names or numbers, got {layers!r}")
    return tuple(single)

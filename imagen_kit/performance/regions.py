"""The repeated blocks of a network: what regional compilation compiles and quantisation quantises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from imagen_kit.errors import KitError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, in the order of its modules.

    These are what its ``repeated_blocks()`` says, where it has such a method; else those children, looked for in
    lists of lists too, of whose class there is more than one. Layers without layers inside do not count.

    Raises:
        KitError: a network without any.
    """
    if hasattr(module, "repeated_blocks"):
        found = list(module.repeated_blocks())  # type: ignore[operator]
    else:
        candidates = [child for child in _children(module) if any(True for _ in child.children())]
        counts = Counter(type(child) for child in candidates)
        found = [child for child in candidates if counts[type(child)] > 1]
    if not found:
        raise KitError(
            f"{type(module).__name__} has no repeated blocks (compile: whole needs none); "
            "give it a method repeated_blocks()"
        )
    return found


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _children(child)
        else:
            yield child

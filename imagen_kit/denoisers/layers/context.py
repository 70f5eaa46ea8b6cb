"""What layers read of the text: its tokens, or the keys and values that were made of them beforehand.

Text stays as it is during a sampling run, so what a network makes of it alone need not be made at every step.
``network.prepare(cond)`` makes it once and keeps it in ``Cond.memory``: first what the network reads itself (a
vector for the embedding, projected tokens), then the keys and values of every layer that attends to text, in the
order of the network's modules. Calls with and without a memory are the same operations on the same numbers.

Axes: b batch, n text tokens, d width, a heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from imagen_kit.conditioning import Cond

#: Text for a block: tokens (b, n, d), or the tensors that its layers have made of them, (b, ...) each.
Context = Tensor | tuple[Tensor, ...] | None


class TextReader(nn.Module):
    """An attention layer that may have keys and values of the text.

    Attributes:
        reads_text: whether it has.
    """

    reads_text: bool = True

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, n, d) → keys and values (b, a, n, d/a)."""
        raise NotImplementedError


def readers(module: nn.Module) -> list[TextReader]:
    """The layers inside that read text, in the order of the modules."""
    return [part for part in module.modules() if isinstance(part, TextReader) and part.reads_text]


def number(blocks: Iterable[nn.Module], first: int = 0) -> None:
    """Tell blocks where in a memory the tensors of their layers lie.

    Args:
        blocks: in the order of the network's modules, all that read text among them.
        first: how many tensors the network keeps for itself, in front.
    """
    for block in blocks:
        last = first + 2 * len(readers(block))
        block.place, first = (first, last), last  # type: ignore[assignment]


def share(context: Context, block: nn.Module) -> Context:
    """What a numbered block is given of the text: the tokens, or its own part of the memory."""
    if not isinstance(context, tuple):
        return context
    first, last = block.place  # type: ignore[misc]
    return context[first:last]


def remember(network: nn.Module, cond: Cond, text: Tensor | None, *own: Tensor | None) -> Cond:
    """The conditioning with a memory.

    Args:
        network: whose layers read the text.
        cond: conditioning of the batch.
        text: tokens (b, n, d) as those layers read them; None where there are none.
        own: what the network keeps for itself; what is None is left out.
    """
    kept = [tensor for tensor in own if tensor is not None]
    if text is not None:
        kept += [tensor for layer in readers(network) for tensor in layer.keys_values(text)]
    return replace(cond, memory=tuple(kept))

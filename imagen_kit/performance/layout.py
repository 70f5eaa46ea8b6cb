"""Memory layout of pictures inside a network: channels last, as convolutions like it, or first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def lay_out(module: nn.Module, memory_format: str) -> None:
    """Put the weights of convolutions into a layout and the picture with them, in place.

    Networks with a switch ``channels_last`` turn their picture round themselves; of others the input is turned.
    """
    for handle in module.__dict__.pop("layout_hooks", ()):
        handle.remove()
    last = memory_format == "channels_last"
    module.to(memory_format=FORMATS[memory_format])  # type: ignore[call-overload]
    if hasattr(module, "channels_last"):
        module.channels_last = last  # type: ignore[assignment]
    elif last:
        module.layout_hooks = [module.register_forward_pre_hook(_turn)]  # type: ignore[assignment]


def convolves(module: nn.Module) -> bool:
    """Whether a network has convolutions larger than its patches: some whose windows overlap."""
    return any(
        isinstance(part, nn.Conv2d) and any(k > s for k, s in zip(part.kernel_size, part.stride, strict=True))
        for part in module.modules()
    )


def _turn(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = inputs[0]
    return (x.contiguous(memory_format=torch.channels_last), *inputs[1:])

"""Lower precision where it costs little: everything but the edges of a network, which stay in float32.

What a kernel adds up, the statistics of norms, the sinusoids of times and the sampler's state are float32 whatever
the weights are. Of the rest, by measurement on the shipped base model against float32 (relative error of its
answer in bfloat16 at native times 0.95, 0.4, 0.02; ``tests/performance/test_precision.py`` keeps to it):

    all of it rounded                                          5.4e-3   5.9e-3   2.7e-2
    time embedding, modulation or norms kept in float32        5.4e-3   5.9e-3   2.7e-2
    first layer, its input unrounded, in float32               5.2e-3   5.6e-3   2.0e-2
    last norm and projection in float32                        3.4e-3   4.1e-3   2.6e-2
    both edges                                                 3.1e-3   3.7e-3   1.9e-2

So the edges it is: they read the noisy picture and write the answer, and hold few weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Children of a network that read the picture, and that make the answer of what the blocks left.
FIRST = ("stem", "x_embedder", "img_in", "patch_embed")
LAST = ("norm_out", "head", "final_layer", "decoder_pred")


def lower(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a network compute in ``dtype`` between edges in float32; in float32, all of it.

    The network then takes a picture of any floating dtype, float32 keeping what it says; it is changed in place,
    also from one dtype to another. Buffers follow their layer, but for those that keep their own dtype.
    """
    restore(module)
    if dtype == torch.float32:
        module.to(dtype)
        return
    handles = []
    for name, child in module.named_children():
        child.to(torch.float32 if name in FIRST + LAST else dtype)
        if name in FIRST:
            handles.append(child.register_forward_pre_hook(_widen))
            handles.append(child.register_forward_hook(_Narrow(dtype)))
        elif name in LAST:
            handles.append(child.register_forward_pre_hook(_widen))
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
    if not any(name in FIRST for name, _ in module.named_children()):
        handles.append(module.register_forward_pre_hook(_NarrowPicture(dtype)))
    module.computes_in, module.edge_hooks = dtype, handles  # type: ignore[assignment]


def restore(module: nn.Module) -> None:
    """Undo what ``lower`` added; weights stay as they are."""
    for handle in module.__dict__.pop("edge_hooks", ()):
        handle.remove()
    module.__dict__.pop("computes_in", None)


def computing_dtype(module: nn.Module) -> torch.dtype:
    """What a network computes in: what ``lower`` made it, else the dtype of its largest weight."""
    weights = [p for p in module.parameters() if p.is_floating_point()]
    largest = max(weights, key=torch.numel).dtype if weights else torch.float32
    return getattr(module, "computes_in", largest)


def picture_dtype(module: nn.Module) -> torch.dtype:
    """What a network is best fed with: float32 where its first layer keeps it."""
    return torch.float32 if hasattr(module, "computes_in") else computing_dtype(module)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(value, torch.float32) for value in inputs)


class _Narrow:
    """A forward hook that rounds a layer's answer; a class, as copies of a module copy its hooks."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


class _NarrowPicture(_Narrow):
    """A forward pre-hook that rounds the picture alone: times stay float32."""

    def __call__(self, module: nn.Module, inputs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return (_cast(inputs[0], self.dtype), *inputs[1:])

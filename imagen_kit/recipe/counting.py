"""Floating-point operations of a call, counted without torch's compiler, which torch's own counter imports.

A multiply-add is two; matrix products, convolutions and attention count, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _linear(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight.shape[-1]


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * weight[0].numel()


def _transposed(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight[0].numel()


def _product(out: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * a.shape[-1]


def _added_product(out: Tensor, base: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return out.numel() * a.shape[-1]


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return out[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


_COUNTS: dict[Any, Callable[..., int]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm), _product
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm), _added_product),
    F.scaled_dot_product_attention: _attention,
}


class Operations(TorchFunctionMode):
    """``with Operations() as counted: network(x)``; then ``counted.flops``."""

    flops = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COUNTS:
            self.flops += 2 * _COUNTS[func](out, *args, **(kwargs or {}))
        return out

"""A linear layer with its activation: two operations that some kernels do as one.

On a CPU oneDNN takes the GELU of a product's sums before it writes them, from the weights as they are stored; torch's
own GELU, a pass of its own, takes a third of such a layer's time. Measured on one thread of an EPYC with avx512_bf16,
torch 2.15, the time of two operations over that of one:

    rows × in → out      2×192→768   64×192→768   256×192→768   2048×192→768   256×384→1536   256×1152→4608
    float32              0.8         1.2          1.3           1.5            1.1            1.3
    bfloat16             1.2         1.5          1.6           1.2 to 1.9     1.2 to 3.5     1.1

The gated form, of two products whose second takes the other's GELU as a factor: 0.95 to 1.0 for gates of 2^16 and 2^17
numbers in float32, 1.0 to 1.2 from 2^18 on; in bfloat16 1.0 for 2^16, 1.1 to 1.3 from 2^17 on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from imagen_kit import fresh

#: Numbers of an answer from which on one operation is faster than two.
LEAST = {torch.float32: 2**15, torch.bfloat16: 1}
#: The same of a gate, where a product is cut in two for it.
LEAST_GATED = {torch.float32: 2**18, torch.bfloat16: 2**17}


class LinearGelu(nn.Linear):
    """gelu(x Wᵀ + b); saved and loaded as the linear layer alone.

    Args:
        in_features, out_features: as of ``torch.nn.Linear``.
        approximate: ``none``: x·Φ(x); ``tanh``: its approximation by tanh (Hendrycks & Gimpel 2016).
        options: of ``torch.nn.Linear``: ``bias``, ``device``, ``dtype``.
    """

    def __init__(self, in_features: int, out_features: int, approximate: str = "none", **options: Any):
        super().__init__(in_features, out_features, **options)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if _fuses(self.weight, x, self.out_features, LEAST):
            return _fused(x, self.weight, self.bias, self.approximate)
        return F.gelu(super().forward(x), approximate=self.approximate)


def gated_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """value·gelu(gate), the halves of layer(x) (GEGLU: Shazeer 2020), GELU exact: (..., in) → (..., out/2)."""
    half = layer.out_features // 2
    if not (_by_parts(layer) and _fuses(layer.weight, x, half, LEAST_GATED)):
        value, gate = layer(x).chunk(2, dim=-1)
        return fresh.multiply(F.gelu(gate), value)
    (weight, weight_gate), (bias, bias_gate) = _cut(layer, half)
    gate = _fused(x, weight_gate, bias_gate, "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, weight, bias, "mul")


def split_gelu(layer: nn.Linear, x: Tensor, first: int, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """layer(x), and the GELU of all but its ``first`` numbers: (..., in) → (..., first), (..., out - first)."""
    rest = layer.out_features - first
    if not (_by_parts(layer) and _fuses(layer.weight, x, rest, LEAST)):
        answer, hidden = layer(x).split([first, rest], dim=-1)
        return answer, F.gelu(hidden, approximate=approximate)
    (weight, weight_rest), (bias, bias_rest) = _cut(layer, first)
    return F.linear(x, weight, bias), _fused(x, weight_rest, bias_rest, approximate)


def _fuses(weight: Tensor, x: Tensor, out: int, least: dict[torch.dtype, int]) -> bool:
    """Whether oneDNN may compute a GELU of ``out`` numbers a row in one operation, and whether that pays.

    It pays from ``least`` numbers on. Never with derivatives, nor for weights that are no plain tensors (quantised,
    packed), nor while operations are watched (counted, traced, compiled): who watches is to see the product and the
    activation.
    """
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype in least
        and x.dtype == weight.dtype
        and x.numel() // x.shape[-1] * out >= least[x.dtype]
        and type(weight) is nn.Parameter
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and _has_onednn()
    )


def _by_parts(layer: nn.Linear) -> bool:
    """Whether a layer's weight is all there is to it, so that rows of it may be used by themselves."""
    return type(layer) is nn.Linear and not layer._forward_pre_hooks and not layer._forward_hooks


def _cut(layer: nn.Linear, first: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Weight and bias, each as its ``first`` rows and the others."""
    bias = (None, None) if layer.bias is None else (layer.bias[:first], layer.bias[first:])
    return (layer.weight[:first], layer.weight[first:]), bias


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

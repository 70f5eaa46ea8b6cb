"""Linear layers whose weights lie in the order in which a CPU's products read them: oneDNN's packed form.

torch multiplies by a weight as it was stored, in float32 by a library that is slower on many CPUs. Packed once,
y = x Wᵀ + b is the same sum in another order, and a GELU after it is taken before the sum is written. Measured on two
threads of an EPYC with avx512_bf16, torch 2.15, time as stored over time packed:

    linear 1152 → 4608, 1 / 16 / 77 / 256 / 1024 rows, float32      4.0   3.3   1.5   1.5   1.2
    the same, bfloat16                                              1.1   1.4   1.2   1.1   1.1
    linear 192 → 768 and the GELU after it, 1024 rows               1.3 in float32, 1.8 in bfloat16
    linear 96 → 96, 256 rows                                        0.7 in float32, 1.1 in bfloat16

So small ones are left in float32. Convolutions are left, too: which order is best for them hangs on the picture's size,
and one that was packed for another size is slower than one that was not, on this machine up to a hundred times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.errors import KitError

LEAST = (
    2**16
)  # numbers of a weight in float32: below, what a call of oneDNN costs besides is more than it saves
_NEEDED = ("_linear_pointwise", "_reorder_linear_weight")


class PackedWeight(nn.Parameter):
    """A weight in oneDNN's own order; numbers are had by ``to_dense()`` alone. It never changes, so copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KitError(
            "packed weights cannot be pickled; save the network's state_dict(), which holds plain ones"
        )


class _Packed(nn.Module):
    """What packed layers have in common.

    ``state_dict`` holds the plain weight and ``load_state_dict`` takes it. Moved to another device or dtype, a
    layer is again the plain one that it was; so it is for derivatives.
    """

    weight: Tensor
    plain: type[nn.Module]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = torch.empty(0, dtype=self.weight.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            _unpack(self)
            return self._apply(fn, recurse)  # of the plain class
        weight = self._parameters.pop("weight")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.to_dense()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        with unpacked(self):
            self._load_from_state_dict(state_dict, prefix, *more)  # of the plain class


class PackedLinear(_Packed, nn.Linear):
    """A linear layer."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if _differentiates(x, self.bias):
            return F.linear(x, self.weight.to_dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedLinearGelu(_Packed, LinearGelu):
    """A linear layer and its GELU in one operation."""

    plain = LinearGelu

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if _differentiates(x, self.bias):
            return F.gelu(F.linear(x, self.weight.to_dense(), self.bias), approximate=self.approximate)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], self.approximate)


_PACKED: dict[type[nn.Module], type[_Packed]] = {
    layer.plain: layer for layer in (PackedLinear, PackedLinearGelu)
}


@cache
def packs() -> bool:
    """Whether this machine's torch packs weights: built with oneDNN, and having the operations."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _NEEDED)


def prepack(module: nn.Module) -> int:
    """Pack the weights of a network's linear layers in place; how many were packed. For the CPU.

    What it cannot pack it leaves: subclasses, quantised weights, other dtypes than float32 and bfloat16. The packed
    weight takes the place of the stored one. Results differ by rounding.

    Args:
        module: in evaluation; the layers' weights are frozen thereby.
    """
    if not packs():
        return 0
    layers = [part for part in module.modules() if _fits(part)]
    for layer in layers:
        _pack(layer)
    return len(layers)


def unpack(module: nn.Module) -> None:
    """Undo ``prepack``; the weights stay frozen."""
    for part in module.modules():
        if isinstance(part, _Packed):
            _unpack(part)


@contextmanager
def unpacked(layer: nn.Module) -> Iterator[None]:
    """A packed layer as the plain one inside the block."""
    _unpack(layer)
    try:
        yield
    finally:
        _pack(layer)


def _fits(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    if type(layer) not in _PACKED or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return False  # another layer, or a weight that is parametrised or quantised
    least = {torch.float32: LEAST, torch.bfloat16: 1}.get(weight.dtype)
    return weight.device.type == "cpu" and least is not None and weight.numel() >= least


def _pack(layer: nn.Module) -> None:
    weight = layer._parameters["weight"]
    assert weight is not None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    layer._parameters["weight"] = PackedWeight(packed, requires_grad=False)
    layer.requires_grad_(False)
    layer.__class__ = _PACKED[type(layer)]


def _unpack(layer: nn.Module) -> None:
    weight = layer._parameters["weight"]
    assert weight is not None
    layer._parameters["weight"] = nn.Parameter(weight.detach().to_dense(), requires_grad=False)
    layer.__class__ = layer.plain  # type: ignore[assignment]


def _differentiates(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))

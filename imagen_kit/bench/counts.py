"""What one call does, counted operation by operation: arithmetic, memory traffic, waits for the device.

Counting runs the work eagerly under a dispatch mode, so it is about the mathematics that was asked for and says
nothing of what a compiler fuses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from imagen_kit.bench.subject import Subject
from imagen_kit.samplers.graphs import waiting

#: Operations that make the host wait for a number that the device computes.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
#: Operations of which only as much of the first argument is read as is answered.
LOOKUPS = ("embedding", "index_select", "index", "gather", "take")
#: Operations that answer with memory as it is, besides those that torch declares to be views.
UNTOUCHED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
#: Operations whose first argument is written and not read.
WRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")


@dataclass(frozen=True)
class Counts:
    """Of one call.

    Attributes:
        flops: floating-point operations, a multiply-add being two; those of matrix products, convolutions and
            attention, as everybody counts them (element by element work is left out).
        bytes: read and written by all operations that are no views, each reading its inputs and writing its
            outputs once: the traffic of a run in which nothing is fused and no cache helps.
        waits: times that the host waits for the device.
    """

    flops: int
    bytes: int
    waits: int


def count(run: Callable[[], Any], on_device: Iterable[Tensor] = ()) -> Counts:
    """Count one call of ``run``.

    Args:
        run: the work, eagerly.
        on_device: tensors that are on the device or would be on an accelerator; whether something waits is
            followed from them, so that it can be counted on a CPU too (copies that a CPU run does not make are
            not seen, so the number is then a lower bound).
    """
    mode = Counting(on_device)
    with _plain_attention(), mode:
        run()
    return Counts(mode.flops, mode.bytes, mode.waits)


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of one call of ``run``, see ``Counts``."""
    return count(run).flops


def least_bytes(subject: Subject, out: Any) -> int:
    """The traffic that no fusing can avoid: weights once a pass, inputs and outputs once."""
    weights = weight_bytes(subject) * subject.passes
    return weights + sum(map(size, subject.inputs)) + sum(map(size, tensors(out)))


def weight_bytes(subject: Subject) -> int:
    """Of a subject's parameters and buffers, those that several modules share once."""
    found = {id(t): t for module in subject.modules for t in (*module.parameters(), *module.buffers())}
    return sum(map(size, found.values()))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of lists, tuples and maps."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def count_sync_warnings(run: Callable[[], Any]) -> int:
    """How often CUDA itself says that ``run`` synchronised with the host."""
    with waiting(torch.device("cuda")) as waits:
        run()
    return len(waits)


class Counting(TorchDispatchMode):
    """Adds up what every operation inside of the ``with`` block does.

    Args:
        on_device: see ``count``.
    """

    def __init__(self, on_device: Iterable[Tensor] = ()):
        super().__init__()
        self.flops = self.bytes = self.waits = 0
        self._formulas = _formulas()
        # Held weakly: a loop's activations must not stay in memory because they were seen.
        self._followed = WeakTensorKeyDictionary(dict.fromkeys(on_device, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in self._formulas:
            with self:  # inference mode hands over products of several operations in one piece
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = tensors((args, kwargs))
        waiting = self._waits(packet.__name__, given)
        out = func(*args, **kwargs)
        if packet in self._formulas:
            self.flops += int(self._formulas[packet](*args, **kwargs, out_val=out))
        self.bytes += 0 if _is_view(func) else _traffic(packet.__name__, given, tensors(out))
        if waiting:
            self._follow(out)
        return out

    def _waits(self, name: str, given: list[Tensor]) -> bool:
        """Count a wait where there is one; whether the operation reads device tensors."""
        followed = any(item.is_cuda or item in self._followed for item in given)
        self.waits += followed and name in READS
        self.waits += name in ("copy_", "_to_copy") and len({item.device for item in given}) > 1
        return followed

    def _follow(self, out: Any) -> None:
        for item in tensors(out):
            if not item.is_cuda:
                self._followed[item] = True


def _traffic(name: str, given: list[Tensor], out: list[Tensor]) -> int:
    if name in UNTOUCHED:
        return 0
    written = sum(map(size, out))
    if name in LOOKUPS:
        return 2 * written + sum(map(size, given[1:]))
    read = given[1:] if name in WRITES else given
    return written + sum(map(size, read))


def size(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take: what an expanded one repeats once, a wrapper's (quantised) parts each."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:
        return sum(size(getattr(tensor, name)) for name in parts()[0])
    whole = tensor.numel() * tensor.element_size()
    return whole if tensor.is_mkldnn else min(whole, tensor.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    """Whether an operation answers with its argument's memory, unwritten."""
    infos = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _formulas() -> dict[Any, Callable[..., int]]:
    """torch's own formulas, and those that its releases lack here and there."""
    from torch.utils.flop_counter import flop_registry

    ops = torch.ops.aten
    ours = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_int_mm": lambda a, b, *_, **__: _product(a, b),
        "_addmm_activation": lambda _, a, b, *__, **___: _product(a, b),
        "mv": lambda a, b, *_, **__: 2 * a.numel(),
        "dot": lambda a, b, *_, **__: 2 * a.numel(),
        "_weight_int8pack_mm": lambda a, b, *_, **__: 2 * a.shape[0] * a.shape[1] * b.shape[0],
    }
    missing = {getattr(ops, name): formula for name, formula in ours.items() if hasattr(ops, name)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        missing[torch.ops.mkldnn._linear_pointwise] = _packed_linear
    return {**missing, **flop_registry}


def _product(a: Tensor, b: Tensor) -> int:
    """(m, k) × (k, n)."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _packed_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """(..., in) × (out, in)ᵀ."""
    return 2 * x.numel() * weight.shape[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their weighted sum, q (b, h, n, d), k (b, g, s, d), v (b, g, s, e); causal ones in full."""
    rows = math.prod(q.shape[:-1])
    return 2 * rows * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> int:
    """The scores once more, and two products for each of the two of the way forth: 5/2 of it."""
    return _attention(q, k, v) * 5 // 2


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` in operations that have formulas, and not as one fused piece."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

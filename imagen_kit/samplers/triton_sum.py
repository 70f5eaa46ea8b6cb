"""A row's weighted sum as one CUDA kernel: every term is read once, the state written once.

float32 accumulation whatever the terms' dtypes, so states may stay float32 beside bfloat16 answers without a
converted copy of either.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imagen_kit.samplers.execution import Weight

#: Terms that one kernel takes; longer rows take one more kernel for every further seven.
TERMS = 8
BLOCK = 1024


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _kernel() -> Any:
    """The kernel, compiled by Triton when it is first launched with a number of terms and their dtypes."""
    import triton
    import triton.language as tl

    @triton.jit
    def combine(
        out, a, b, c, d, e, f, g, h, wa, wb, wc, wd, we, wf, wg, wh, n, K: tl.constexpr, B: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
        inside = at < n
        total = tl.load(a + at, mask=inside).to(tl.float32) * wa
        if K > 1:
            total += tl.load(b + at, mask=inside).to(tl.float32) * wb
        if K > 2:
            total += tl.load(c + at, mask=inside).to(tl.float32) * wc
        if K > 3:
            total += tl.load(d + at, mask=inside).to(tl.float32) * wd
        if K > 4:
            total += tl.load(e + at, mask=inside).to(tl.float32) * we
        if K > 5:
            total += tl.load(f + at, mask=inside).to(tl.float32) * wf
        if K > 6:
            total += tl.load(g + at, mask=inside).to(tl.float32) * wg
        if K > 7:
            total += tl.load(h + at, mask=inside).to(tl.float32) * wh
        tl.store(out + at, total, mask=inside)

    return combine


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """Σ weight · tensor in float32; tensors of one shape, of float32, float16 or bfloat16.

    Falls back to torch's kernels where a gradient is wanted, for weights of every sample's own, and for
    layouts that differ.
    """
    from imagen_kit.samplers import execution

    plain = any(isinstance(weight, Tensor) for weight in weights)
    plain = plain or not all(tensor.is_contiguous() for tensor in tensors)
    if plain or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return execution.weighted_sum([tensor.float() for tensor in tensors], weights)
    total = torch.empty_like(tensors[0], dtype=torch.float32)
    left, factors = list(tensors), [float(weight) for weight in weights]
    while True:
        k, n = min(len(left), TERMS), total.numel()
        pointers = left[:k] + [left[0]] * (TERMS - k)
        numbers = factors[:k] + [0.0] * (TERMS - k)
        with torch.cuda.device(total.device) if total.is_cuda else contextlib.nullcontext():
            _kernel()[(-(-n // BLOCK),)](total, *pointers, *numbers, n, K=k, B=BLOCK)
        left, factors = left[k:], factors[k:]
        if not left:
            return total
        left, factors = [total, *left], [1.0, *factors]


weighted_sum.takes_any_dtype = True  # type: ignore[attr-defined]

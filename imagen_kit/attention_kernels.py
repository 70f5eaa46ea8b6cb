"""Attention by one kernel and no other: those of torch's fused function, and FlashAttention 3.

Axes: b batch, a heads, n queries, m keys, d head width. All take q, k, v (b, a, n or m, d), a bool mask (4-D, True =
attend) or None, and the factor on the logits.

What a kernel cannot take is an error, so that a measurement measures what it says. The one exception: on a GPU the
flash kernels know no mask, and calls with one (attention to padded text) are answered by torch's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imagen_kit.errors import KitError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
#: Kernels that only GPUs have.
ON_GPUS = ("cudnn", "efficient", "flash3")
FLASH3 = "flash_attn_interface"  # the module that FlashAttention 3 installs


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's FlashAttention (Dao 2023); on the CPU its blocked kernel, which knows masks."""
    if mask is not None and q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return _only("flash", SDPBackend.FLASH_ATTENTION, q, k, v, mask, scale)


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's memory-efficient kernel (Rabe & Staats 2021)."""
    return _only("efficient", SDPBackend.EFFICIENT_ATTENTION, q, k, v, mask, scale)


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """cuDNN's fused kernel. It promises nothing for a row without keys, so such rows are opened and zeroed."""
    some = None
    if mask is not None:
        some = mask.any(-1, keepdim=True)
        mask = mask | ~some
    out = _only("cudnn", SDPBackend.CUDNN_ATTENTION, q, k, v, mask, scale)
    return out if some is None else out * some


def math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's unfused form: all logits in memory."""
    return _only("math", SDPBackend.MATH, q, k, v, mask, scale)


def flash3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """FlashAttention 3 (Shah et al. 2024), for Hopper GPUs, in fp16 or bf16."""
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    from flash_attn_interface import flash_attn_func

    if q.dtype not in (torch.float16, torch.bfloat16):
        raise KitError(f"attention backend 'flash3' computes in bf16 or fp16, not {_short(q.dtype)}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (b, n, a, d)
    out = flash_attn_func(q, k, v, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # early releases also give the sums


KERNELS: dict[str, Kernel] = {
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "math": math,
    "flash3": flash3,
}


@cache
def missing(name: str) -> str | None:
    """Why the kernel cannot be had on this machine, or None where it can."""
    if name in ON_GPUS and not torch.cuda.is_available():
        return "needs a GPU"
    if name == "flash3":
        if torch.cuda.get_device_capability() < (9, 0):
            return "needs a Hopper GPU (compute capability 9.0)"
        if find_spec(FLASH3) is None:
            return f"is not installed (FlashAttention 3, the module {FLASH3})"
    return None


def _only(
    name: str,
    kernel: SDPBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    try:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
            raise
        what = f"{q.device.type} in {_short(q.dtype)}, head width {q.shape[-1]}"
        masked = "" if mask is None else ", with a mask"
        raise KitError(f"attention backend {name!r} has no kernel for {what}{masked}; choose sdpa") from error


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The one attention function; nothing else in the package knows which kernel computes it.

Axes: b batch, a heads, n queries, m keys, d head width.

    attention(q, k, v) = softmax(q kᵀ · scale + mask) v          (Vaswani et al. 2017, Eq. 1)

Backends, chosen for a call (``backend=``), a block of code (``use_backend``) or for good (``set_backend``):

    sdpa      torch's fused kernels, whichever it finds best; the default
    flash, cudnn, efficient, math
              one of those kernels and no other (see ``attention_kernels``)
    flash3    FlashAttention 3 (Hopper GPUs, where ``flash_attn_interface`` is installed)
    eager     plain tensor operations; can record its maps (``record_maps``)
    flex      torch's flex_attention, compiled where it runs on an accelerator; no backward on the CPU
    xformers  xformers' memory-efficient kernels (CUDA; ``pip install imagen-kit[xformers]``)

A query with no key to attend to is answered with zeros by every backend, and its gradients are zero too.

On a CPU the default stays torch's blocked kernel, in bfloat16 too. Measured on one thread of an EPYC with avx512_bf16
(no amx), torch 2.15, head widths 32 to 128, 128 to 4096 tokens, 77 keys with and without a mask: its time over that of
two products and a softmax, in pieces of 1 MiB of logits, and the error of these over its own (from float64):

    logits in bfloat16                                          1.2 to 1.9    error 2 to 70 times
    the same, the row's estimated maximum taken off before      1.0 to 1.6    error 1.3 to 8 times
    logits in float32                                           0.8 to 1.25   error 1.1 to 1.3 times

Rounded logits do not tell keys apart that have much in common; exact ones gain too little to keep. In float32 the plain
form takes longer at all sizes.

``own_values`` makes chosen samples of a batch attend to themselves alone (perturbed-attention guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagen_kit.attention_kernels import KERNELS, missing
from imagen_kit.errors import KitError, unknown

# Process-wide. torch.compile guards on them, so a compiled model follows a switch by compiling once more.
_active = "sdpa"
_recorder: Callable[[Tensor], None] | None = None
# Samples answered with their own values, by thread; empty (and no more than a guard) unless guidance asks.
_own: dict[int, list[Own]] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
    scale: float | None = None,
) -> Tensor:
    """(b, a, n, d) from q (b, a, n, d) and k, v (b, a, m, d).

    Args:
        mask: bool, True = attend; (b, m), or 4-D and broadcastable to (b, a, n, m).
        backend: overrides the active one for this call.
        scale: factor on the logits; d^(-1/2) by default.

    Raises:
        KitError: an unknown or unavailable backend, or a mask that is not boolean.
    """
    name = (_active if _recorder is None else "eager") if backend is None else _checked(backend)
    if mask is not None:
        if (
            mask.dtype is not torch.bool
        ):  # a float mask of ones and zeros would be added to the logits unnoticed
            raise KitError(
                f"attention mask must be bool (True = attend), not {str(mask.dtype).removeprefix('torch.')}"
            )
        if mask.ndim == 2:
            mask = mask[:, None, None, :]
    if name == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = _OTHERS[name](q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    return _with_own(out, v) if _own else out


def backends() -> list[str]:
    """Names of the backends that can be chosen here."""
    return [name for name in ("sdpa", *_OTHERS) if _absent(name) is None]


def set_backend(name: str) -> None:
    """Make ``name`` the backend of the process; KitError for an unknown or unavailable one."""
    global _active
    _active = _checked(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use ``name`` inside the block, in every thread; KitError for an unknown or unavailable one."""
    before = _active
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@contextmanager
def record_maps(keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Collect the attention maps of the block, in the order of the calls, using the eager backend.

    Args:
        keep: what to keep of a map, e.g. ``lambda p: p.mean(1).cpu()``; all of it by default.

    Yields:
        a list that fills with maps (b, a, n, m), rows summing to 1 (to 0 where nothing may be attended to).
        Not for code inside torch.compile; gradient checkpointing records a block again as it recomputes it.
    """
    global _recorder
    maps: list[Tensor] = []
    before, _recorder = _recorder, lambda p: maps.append(p if keep is None else keep(p))
    try:
        yield maps
    finally:
        _recorder = before


@dataclass(eq=False)
class Own:
    """Samples whose attention maps are the identity, and how many calls have seen to that."""

    rows: slice
    calls: int = 0


@contextmanager
def own_values(rows: slice) -> Iterator[Own]:
    """Attention maps of these samples are the identity inside the block, in this thread.

    A query is answered with its own value. Where keys outnumber queries, those of the queries come last (as
    where text tokens are joined in front of the picture's).
    """
    mine, own = _own.setdefault(get_ident(), []), Own(rows)
    mine.append(own)
    try:
        yield own
    finally:
        mine.remove(own)
        if not mine:
            _own.pop(get_ident(), None)


def _with_own(out: Tensor, v: Tensor) -> Tensor:
    values = v[:, :, v.shape[2] - out.shape[2] :]
    for own in _own.get(get_ident(), ()):
        start, stop, _ = own.rows.indices(len(out))
        out = torch.cat([out[:start], values[start:stop], out[stop:]])
        own.calls += 1
    return out


@cache
def _has_xformers() -> bool:
    return find_spec("xformers") is not None


def _checked(name: str) -> str:
    if name == "sdpa":
        return name
    if name not in _OTHERS:
        raise KitError(unknown("attention backend", name, ("sdpa", *_OTHERS)))
    if (reason := _absent(name)) is not None:
        raise KitError(f"attention backend {name!r} {reason}; choose from {', '.join(backends())}")
    return name


def _absent(name: str) -> str | None:
    """Why a backend cannot be chosen here, or None."""
    if name == "xformers" and not _has_xformers():
        return "is not installed (pip install 'imagen-kit[xformers]')"
    return missing(name)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        # the lowest finite number rather than -inf: a row without keys must stay free of NaN, also backwards
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    if _recorder is not None:
        _recorder(weights.detach())
    return weights.to(v.dtype) @ v


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise KitError(
            "attention backend 'flex' has no backward on the CPU; choose sdpa or eager for training there"
        )
    score_mod = None
    if mask is not None:
        full = mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])  # a view: nothing is copied

        def score_mod(score: Tensor, b: Tensor, a: Tensor, n: Tensor, m: Tensor) -> Tensor:
            return torch.where(full[b, a, n, m], score, -float("inf"))

    # Called plainly it forms all logits, which will do on the CPU; a compiled model compiles it along.
    run: Any = flex_attention if on_cpu or torch.compiler.is_compiling() else _compiled_flex()
    return run(q, k, v, score_mod=score_mod, scale=scale)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = some = None
    if mask is not None:
        # Its kernels promise nothing for a row without keys: open such rows, and zero their answers below.
        some = mask.any(-1, keepdim=True)
        b, a, n, m = len(q), q.shape[1], q.shape[2], k.shape[2]
        # Rows must start at multiples of 8 elements, so the bias is a slice of a wider tensor.
        bias = q.new_zeros(b, a, n, m + -m % 8)[..., :m].masked_fill_(~(mask | ~some), -float("inf"))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (b, n, a, d)
    try:
        out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    except NotImplementedError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no kernel for these inputs"
        raise KitError(
            f"attention backend 'xformers' cannot run on {q.device.type} {q.dtype}: {reason}"
        ) from error
    out = out.transpose(1, 2)
    return out if some is None else out * some


_OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "eager": _eager,
    "flex": _flex,
    "xformers": _xformers,
    **KERNELS,
}

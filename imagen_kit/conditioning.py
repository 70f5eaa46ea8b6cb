"""What a denoiser is told besides the noisy picture and the time.

Axes: b batch, n text tokens, d token width, p pooled width, c h w picture, k size numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_EMBEDDED = ("low_res_level", "size", "guidance")


@dataclass(frozen=True)
class TextEmbeddings:
    """A text encoder's answer.

    Attributes:
        tokens: (b, n, d) contextual embeddings; masked positions are zero.
        mask: (b, n) bool, True where a token is real.
        pooled: (b, p) one vector a prompt, or None where the encoder has none.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Cond:
    """Conditioning of one batch; absent parts are None.

    Attributes:
        tokens: (b, n, d) text embeddings.
        mask: (b, n) bool, True = attend.
        pooled: (b, p) pooled text.
        labels: (b,) int64 class labels; ``num_classes`` stands for "no class".
        low_res: (b, c, h, w) low-resolution picture in [-1, 1], already noised and resized to x's size.
        low_res_level: (b,) its noise level in [0, 1].
        size: (b, k) size and crop numbers (SDXL, PixArt).
        guidance: (b,) scale told to a network distilled from guided ones (FLUX.1-dev).
        memory: what one network's ``prepare`` has made of the rest, tensors (b, ...); for that network alone.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    low_res: Tensor | None = None
    low_res_level: Tensor | None = None
    size: Tensor | None = None
    guidance: Tensor | None = None
    memory: tuple[Tensor, ...] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        """The same conditioning with ``function`` applied to every tensor present."""
        return self._each(lambda name, value: function(value))

    def _each(self, function: Callable[[str, Tensor], Tensor]) -> Cond:
        """``map`` with the name of each tensor."""
        parts = {name: function(name, value) for name, value in self.parts().items()}
        kept = None if self.memory is None else tuple(function("memory", value) for value in self.memory)
        return Cond(**parts, memory=kept)

    def parts(self) -> dict[str, Tensor]:
        """The tensors present, by name, but for the memory."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "memory")
        return {name: value for name, value in values if value is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Move; ``dtype`` changes embeddings and pictures.

        Numbers that are embedded (noise level, sizes, guidance) stay as they are: in bfloat16 a level times
        1000 would be off by up to 2.
        """

        def move(name: str, value: Tensor) -> Tensor:
            cast = dtype is not None and value.is_floating_point() and name not in _EMBEDDED
            return value.to(device=device, dtype=dtype if cast else None)

        return self._each(move)

    def __getitem__(self, index: slice | Tensor) -> Cond:
        return self.map(lambda v: v[index])

    @property
    def batch(self) -> int | None:
        """Batch size, or None when nothing is present."""
        return next((len(value) for value in self.parts().values()), None)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Concatenate along the batch; shorter token sequences are padded with masked zeros.

        Memories are joined where all have one and they are of one shape; else the result has none.

        Raises:
            ValueError: a part is present in some and absent in others.
        """
        out: dict[str, Tensor] = {}
        parts = [cond.parts() for cond in conds]
        for name in dict.fromkeys(name for part in parts for name in part):
            present = [part[name] for part in parts if name in part]
            if len(present) != len(parts):
                raise ValueError(
                    f"conditioning {name!r} is present in some parts of the batch and absent in others"
                )
            if name in ("tokens", "mask"):
                longest = max(v.shape[1] for v in present)
                pad = [(0, 0) * (v.ndim - 2) + (0, longest - v.shape[1]) for v in present]
                present = [torch.nn.functional.pad(v, p) for v, p in zip(present, pad, strict=True)]
            out[name] = torch.cat(present)
        return Cond(**out, memory=_joined([cond.memory for cond in conds]))


def _joined(memories: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """Memories along the batch, or None where they do not fit together."""
    found = [memory for memory in memories if memory is not None]
    shapes = [[value.shape[1:] for value in memory] for memory in found]
    if not found or len(found) < len(memories) or any(shape != shapes[0] for shape in shapes):
        return None
    return tuple(torch.cat(values) for values in zip(*found, strict=True))

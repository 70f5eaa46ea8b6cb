"""What every text encoder shares: prompts in, padded embeddings out, each prompt encoded once.

Axes: b prompts, n tokens, d token width, p pooled width. Subclasses answer with one ``Row`` a prompt (its
real tokens only); padding is added here, so it cannot leak into an embedding or differ between batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imagen_kit.conditioning import TextEmbeddings
from imagen_kit.errors import KitError


@dataclass(frozen=True)
class Row:
    """One prompt's embedding: ``tokens`` (n, d) float32, no padding; ``pooled`` (p,) or None."""

    tokens: Tensor
    pooled: Tensor | None = None


class TextEncoder(nn.Module):
    """A frozen text encoder: ``encoder(prompts) -> TextEmbeddings`` in float32, without gradients.

    Args:
        kind: registered name, for messages.
        dim: token width d.
        pooled_dim: pooled width p, or None where the encoder has no pooled vector.
        max_length: most tokens a prompt may have; longer prompts are cut.
        pad_to_max: pad to ``max_length`` instead of the longest prompt of the call (fixed shapes).
        cache: prompts whose embeddings are remembered (least recently used go first); 0 turns it off.
    """

    fp16_safe = True

    def __init__(
        self,
        kind: str,
        *,
        dim: int,
        pooled_dim: int | None,
        max_length: int,
        pad_to_max: bool = False,
        cache: int = 128,
    ):
        super().__init__()
        if max_length < 1:
            raise KitError(f"text encoder {kind!r}: max_length is {max_length}; it must be at least 1")
        if cache < 0:
            raise KitError(
                f"text encoder {kind!r}: cache is {cache}; it must be 0 (off) or a number of prompts"
            )
        self.kind = kind
        self.dim = dim
        self.pooled_dim = pooled_dim
        self.max_length = max_length
        self.pad_to_max = pad_to_max
        self.cache_size = cache
        self._cache: OrderedDict[str, Row] = OrderedDict()
        #: What surrounds encoding; replaced where the weights are elsewhere meanwhile (``performance.offload``).
        self.working: Callable[[], AbstractContextManager[object]] = nullcontext
        # Follows .to(device, dtype) also in encoders without parameters.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where embeddings are made and returned."""
        return self._anchor.device

    _anchor: Tensor

    def forward(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embed ``prompts`` (b of them).

        Returns:
            tokens (b, n, d) float32 with exact zeros where masked, mask (b, n) bool, pooled (b, p) or None;
            n is the longest prompt's length, or ``max_length`` with ``pad_to_max``.

        Raises:
            KitError: no prompts, something that is not text, or embeddings that are not finite.
        """
        rows = self.rows(prompts)
        tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)
        if self.pad_to_max:
            tokens = nn.functional.pad(tokens, (0, 0, 0, self.max_length - tokens.shape[1]))
        lengths = torch.tensor([len(row.tokens) for row in rows], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextEmbeddings(tokens, mask, torch.stack(pooled) if pooled else None)

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        """One unpadded ``Row`` a prompt, in order; only prompts not seen lately are encoded, each once."""
        if isinstance(prompts, str):
            raise KitError(f"text encoder {self.kind!r} takes a list of prompts, not one string")
        prompts = list(prompts)
        if not prompts:
            raise KitError(f"text encoder {self.kind!r} got an empty list of prompts; give at least one")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise KitError(f"prompt {prompt!r} is not text; text encoder {self.kind!r} takes strings")
        known = {prompt: self._cache[prompt] for prompt in dict.fromkeys(prompts) if prompt in self._cache}
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if fresh:
            with self.working(), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                known.update(zip(fresh, self._encode(fresh), strict=True))
        self._remember(known)
        return [self._here(known[prompt]) for prompt in prompts]

    @abstractmethod
    def _encode(self, prompts: list[str]) -> list[Row]:
        """Embed distinct prompts; called without gradients and outside autocast."""

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode: the encoder is frozen, dropout never acts."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def _remember(self, rows: dict[str, Row]) -> None:
        for prompt, row in rows.items():
            self._cache[prompt] = row
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)

    def _here(self, row: Row) -> Row:
        pooled = None if row.pooled is None else row.pooled.to(self.device)
        return Row(row.tokens.to(self.device), pooled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextEncoder:
        before = self._anchor.dtype
        after = fn(torch.empty(0, dtype=before, device=self.device)).dtype
        if after == torch.float16 and not self.fp16_safe:
            raise KitError(f"text encoder {self.kind!r} overflows in fp16; use bf16 or fp32")
        if after != before:  # a move keeps what is remembered, a change of precision does not
            self._cache.clear()
        return super()._apply(fn, recurse)

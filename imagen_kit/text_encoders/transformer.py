"""Text encoders that run a transformer over token ids: batching, padding, pooling, precision, the finite
check."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError, unknown
from imagen_kit.text_encoders.base import Row, TextEncoder
from imagen_kit.text_encoders.tokenizers import Tokenizer

PADDINGS = ("masked", "kept", "attended")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 32
LARGE = 1_000_000_000


class TransformerEncoder(TextEncoder):
    """A ``TextEncoder`` around a network and its tokenizer.

    Args:
        kind: registered name, for messages.
        network: the transformer; frozen here.
        tokenizer: prompts to ids.
        depth: number of its blocks.
        layer: ``"last"``, ``"penultimate"``, or -1, -2, ... counted from the last block.
        padding: what a model trained with padded prompts expects, see the encoders' docstrings:
            ``masked``: padding is attended by nothing and zero;
            ``kept``: hidden from the encoder, but its outputs are kept and count as tokens (DeepFloyd IF);
            ``attended``: as if it were text (Stable Diffusion, FLUX). The latter two always give
            ``max_length`` tokens.
        dtype: ``auto`` (fp32; bf16 from a billion parameters on), ``fp32``, ``bf16`` or, where safe,
            ``fp16``.
    """

    def __init__(
        self,
        kind: str,
        network: nn.Module,
        tokenizer: Tokenizer,
        *,
        depth: int,
        layer: str | int,
        padding: str,
        dtype: str,
        **common: Any,
    ):
        super().__init__(kind, **common)
        if padding not in PADDINGS:
            raise KitError(unknown("padding", padding, PADDINGS))
        self.network = network
        self.tokenizer = tokenizer
        self.padding = padding
        self.block = _block(kind, layer, depth)
        self._freeze()
        self.to(precision(kind, dtype, network, self.fp16_safe))

    @abstractmethod
    def _run(self, ids: Tensor, mask: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens (b, n, d), pooled (b, p) or None) of ids (b, n); mask (b, n) bool; ends (b,) last real
        position."""

    @abstractmethod
    def _blocks(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Embeddings and the output of every block, to find where values stop being finite."""

    def _encode(self, prompts: list[str]) -> list[Row]:
        ids = self.tokenizer(prompts, self.max_length)
        order = sorted(
            range(len(prompts)), key=lambda i: len(ids[i])
        )  # like lengths together: little padding
        rows: dict[int, Row] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows.update(zip(chosen, self._embed([ids[i] for i in chosen]), strict=True))
        return [rows[i] for i in range(len(prompts))]

    def _embed(self, ids: list[list[int]]) -> Iterator[Row]:
        lengths = [len(row) for row in ids]
        width = max(lengths) if self.padding == "masked" else self.max_length
        padded = torch.tensor(
            [row + [self.tokenizer.pad_id] * (width - len(row)) for row in ids], device=self.device
        )
        ends = torch.tensor(lengths, device=self.device) - 1
        mask = torch.arange(width, device=self.device) <= ends[:, None]
        if self.padding == "attended":
            mask = torch.ones_like(mask)
        tokens, pooled = self._run(padded, mask, ends)
        finite = (
            tokens.isfinite().all() if pooled is None else tokens.isfinite().all() & pooled.isfinite().all()
        )
        if not finite:
            raise KitError(self._diagnosis(padded, mask))
        for i, length in enumerate(lengths):
            # Cloned, so that a remembered row does not hold on to its whole batch.
            row = tokens[i, : length if self.padding == "masked" else width].float().clone()
            yield Row(row, None if pooled is None else pooled[i].float().clone())

    def _diagnosis(self, ids: Tensor, mask: Tensor) -> str:
        precision = str(self._anchor.dtype).removeprefix("torch.")
        bad = next((i for i, x in enumerate(self._blocks(ids, mask)) if not x.isfinite().all()), None)
        where = (
            "at the output" if bad is None else "in the embeddings" if bad == 0 else f"from block {bad} on"
        )
        return (
            f"text encoder {self.kind!r} in {precision} gives values that are not finite {where}; "
            "check its weights, or run it in fp32"
        )


def tower_length(kind: str, asked: int | None, positions: int) -> int:
    """A CLIP tower's ``max_length``: what was asked for, which must hold a start and an end token, or all."""
    if asked is not None and not 2 <= asked <= positions:
        raise KitError(
            f"text encoder {kind!r}: max_length is {asked}; the tower has {positions} positions, "
            "two of them for the start and end tokens"
        )
    return asked or positions


def _block(kind: str, layer: str | int, depth: int) -> int:
    """1-based number of the block whose output is used."""
    named = {"last": -1, "penultimate": -2}
    if isinstance(layer, str) and layer not in named:
        raise KitError(unknown(f"{kind} layer", layer, named))
    back = named[layer] if isinstance(layer, str) else layer
    if not -depth <= back <= -1:
        raise KitError(
            f"text encoder {kind!r} has {depth} blocks; layer {layer!r} must be between -{depth} and -1"
        )
    return depth + 1 + back


def precision(kind: str, name: str, network: nn.Module, fp16_safe: bool) -> torch.dtype:
    """The dtype that ``name`` stands for in an encoder; KitError for an unknown or unsafe one."""
    choices = ["auto", "fp32", "bf16"] + ["fp16"] * fp16_safe
    if name == "fp16" and not fp16_safe:
        raise KitError(f"text encoder {kind!r} overflows in fp16; use bf16 or fp32")
    if name not in choices:
        raise KitError(unknown("dtype", name, choices))
    if name == "auto":
        return torch.bfloat16 if sum(p.numel() for p in network.parameters()) >= LARGE else torch.float32
    return DTYPES[name]

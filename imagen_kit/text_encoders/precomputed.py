"""Embeddings made once and read from a file: no encoder in memory while a model trains or samples.

One safetensors file, variable lengths stored without padding (N tokens of P prompts in all):

    tokens (N, d), token_ends (P,) int64     prompt i owns tokens[token_ends[i-1]:token_ends[i]]
    pooled (P, p)                            where the encoder has a pooled vector
    prompts (bytes,) uint8, prompt_ends (P,) int64   the prompts in UTF-8, one after the other
    metadata: format, encoder, max_length
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_kit import weights_path
from imagen_kit.errors import KitError, nearest, unknown
from imagen_kit.text_encoders import register
from imagen_kit.text_encoders.base import Row, TextEncoder

FORMAT = "imagen-kit-text-embeddings/1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEEDED = ("tokens", "token_ends", "prompts", "prompt_ends")


@register("precomputed", family="embeddings from a file")
class PrecomputedTextEncoder(TextEncoder):
    """Looks prompts up in a file that ``write`` made; tokens stay on disk until they are asked for.

    Args:
        file: path (or ``package:...``) of the safetensors file.
        max_length: cut prompts after so many tokens; None for the length they were made with.
        pad_to_max: always ``max_length`` tokens (fixed shapes).
        cache: prompts kept in memory.

    Raises:
        KitError: the file is absent, truncated, no safetensors file or of another format; a prompt it lacks.
    """

    def __init__(
        self, file: str | Path, max_length: int | None = None, pad_to_max: bool = False, cache: int = 128
    ):
        path = weights_path.resolve(file)
        self._file, small, metadata = _open(path)
        bounds = [0, *small["prompt_ends"].tolist()]
        text = small["prompts"].numpy().tobytes()
        ends = [0, *small["token_ends"].tolist()]
        shape = self._file.get_slice("tokens").get_shape()
        if bounds[-1] != len(text) or ends[-1] != shape[0] or len(bounds) != len(ends):
            raise KitError(f"{path} is damaged: its prompts and tokens do not match their offsets")
        pooled = "pooled" in set(self._file.keys())
        super().__init__(
            "precomputed",
            dim=shape[1],
            pooled_dim=self._file.get_slice("pooled").get_shape()[1] if pooled else None,
            max_length=max_length or int(metadata["max_length"]),
            pad_to_max=pad_to_max,
            cache=cache,
        )
        self.path = path
        self.made_by = metadata.get("encoder", "")
        self._spans = {
            text[a:b].decode("utf-8"): (i, *span)
            for i, ((a, b), span) in enumerate(zip(pairwise(bounds), pairwise(ends), strict=True))
        }
        self._freeze()

    @property
    def prompts(self) -> list[str]:
        """Every prompt in the file, in the order it was written."""
        return list(self._spans)

    def _encode(self, prompts: list[str]) -> list[Row]:
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: str) -> Row:
        if prompt not in self._spans:
            guess = nearest(prompt, self._spans)
            hint = f"the nearest is {guess!r}" if guess is not None else f"it holds {len(self._spans)} others"
            raise KitError(f"prompt {prompt!r} is not in {self.path}; {hint}")
        i, start, end = self._spans[prompt]
        tokens = self._file.get_slice("tokens")[start : min(end, start + self.max_length)]
        pooled = self._file.get_slice("pooled")[i] if self.pooled_dim else None
        return Row(tokens.float(), None if pooled is None else pooled.float())


def write(
    file: str | Path, encoder: TextEncoder, prompts: Iterable[str], dtype: str = "fp32", batch: int = 64
) -> int:
    """Embed ``prompts`` and the empty prompt (guidance needs it) with ``encoder`` into ``file``.

    Args:
        file: where to write; it appears whole or not at all.
        encoder: any text encoder.
        prompts: repetitions are embedded once.
        dtype: ``fp32``, ``bf16`` or ``fp16`` on disk.
        batch: prompts embedded at a time.

    Returns:
        The number of prompts in the file.

    Raises:
        KitError: embeddings that do not fit ``dtype``, an unwritable file.
    """
    if dtype not in DTYPES:
        raise KitError(unknown("dtype", dtype, DTYPES))
    texts = list(dict.fromkeys(["", *prompts]))
    rows: list[Row] = []
    for start in range(0, len(texts), batch):
        rows += [_stored(row, DTYPES[dtype]) for row in encoder.rows(texts[start : start + batch])]
    encoded = [text.encode("utf-8") for text in texts]
    tensors = {
        "tokens": torch.cat([row.tokens for row in rows]),
        "token_ends": torch.tensor([len(row.tokens) for row in rows]).cumsum(0),
        "prompts": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        if any(encoded)
        else torch.empty(0, dtype=torch.uint8),
        "prompt_ends": torch.tensor([len(text) for text in encoded]).cumsum(0),
    }
    if encoder.pooled_dim:
        tensors["pooled"] = torch.stack([row.pooled for row in rows if row.pooled is not None])
    _save(Path(file).expanduser(), tensors, {"encoder": encoder.kind, "max_length": str(encoder.max_length)})
    return len(texts)


def _stored(row: Row, dtype: torch.dtype) -> Row:
    def cast(x: Tensor) -> Tensor:
        x = x.to("cpu", dtype)
        if not x.isfinite().all():
            raise KitError(
                f"embeddings do not fit {str(dtype).removeprefix('torch.')}; store them in bf16 or fp32"
            )
        return x

    return Row(cast(row.tokens), None if row.pooled is None else cast(row.pooled))


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    except OSError as error:
        raise KitError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        save_file(tensors, part, metadata={"format": FORMAT, **facts})
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _open(path: Path) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        metadata, names = file.metadata() or {}, set(file.keys())
        missing = [key for key in _NEEDED if key not in names]
        if metadata.get("format") != FORMAT or missing:
            raise KitError(
                f"{path} holds no text embeddings (format {FORMAT}); make one with precomputed.write"
            )
        return file, {key: file.get_tensor(key) for key in _NEEDED[1:]}, metadata
    except (SafetensorError, OSError) as error:
        raise KitError(f"{path} is not a whole safetensors file: {error}") from error

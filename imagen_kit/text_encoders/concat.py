"""Several encoders as one: their embeddings side by side in channels, or one after the other in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError, unknown
from imagen_kit.text_encoders import create, register
from imagen_kit.text_encoders.base import Row, TextEncoder

ALONG = ("channels", "tokens")
USES = ("both", "tokens", "pooled")


@register("concat", family="any encoders together")
class ConcatTextEncoder(TextEncoder):
    """Concatenation of text encoders.

    ``channels`` puts token i of every encoder side by side (SDXL; shorter ones are filled with zeros, a
    position is real where any encoder has a token); ``tokens`` puts the sequences one after the other
    without gaps, narrower ones filled with zeros to the widest (SD3). Pooled vectors are always joined in
    channels. Encoders nest.

    Args:
        encoders: one dict an encoder: ``name``, its options, and optionally ``use``: ``both`` (default),
            ``tokens`` or ``pooled`` (FLUX: tokens of T5, pooled vector of CLIP). Built encoders are taken as
            they are.
        along: ``channels`` or ``tokens``.
        pad_to_max: always the encoders' greatest length (channels) or the sum of their lengths (tokens).

    Raises:
        KitError: fewer than one encoder, one without a name, an encoder's own faults (with its place in the
            list).
    """

    def __init__(
        self,
        encoders: Sequence[Mapping[str, Any] | TextEncoder],
        along: str = "channels",
        pad_to_max: bool = False,
    ):
        if along not in ALONG:
            raise KitError(unknown("direction", along, ALONG))
        parts, uses = _build(encoders)
        worded = [part for part, use in zip(parts, uses, strict=True) if use != "pooled"]
        pooled = [
            p.pooled_dim for p, use in zip(parts, uses, strict=True) if use != "tokens" and p.pooled_dim
        ]
        if not worded:
            raise KitError(
                "text encoder 'concat': every encoder has use 'pooled'; at least one must give tokens"
            )
        across = along == "channels"
        super().__init__(
            "concat",
            dim=(sum if across else max)(part.dim for part in worded),
            pooled_dim=sum(pooled) or None,
            max_length=(max if across else sum)(part.max_length for part in worded),
            pad_to_max=pad_to_max,
            cache=0,  # the parts remember
        )
        self.parts = nn.ModuleList(parts)
        self.uses = uses
        self.along = along
        self._freeze()

    def _encode(self, prompts: list[str]) -> list[Row]:
        columns = [part.rows(prompts) for part in self.parts]  # type: ignore[operator]
        return [self._join(row) for row in zip(*columns, strict=True)]

    def _join(self, rows: Sequence[Row]) -> Row:
        tokens = [row.tokens for row, use in zip(rows, self.uses, strict=True) if use != "pooled"]
        pooled = [
            row.pooled
            for row, use in zip(rows, self.uses, strict=True)
            if use != "tokens" and row.pooled is not None
        ]
        if self.along == "tokens":
            joined = torch.cat([_widen(t, len(t), self.dim) for t in tokens])
        else:
            longest = max(len(t) for t in tokens)
            joined = torch.cat([_widen(t, longest, t.shape[1]) for t in tokens], dim=1)
        return Row(joined, torch.cat(pooled) if pooled else None)


def _widen(tokens: Tensor, length: int, width: int) -> Tensor:
    return nn.functional.pad(tokens, (0, width - tokens.shape[1], 0, length - len(tokens)))


def _build(encoders: Sequence[Mapping[str, Any] | TextEncoder]) -> tuple[list[TextEncoder], list[str]]:
    if not isinstance(encoders, Sequence) or isinstance(encoders, str) or not encoders:
        raise KitError("text encoder 'concat' needs a list of encoders, each with its name")
    parts, uses = [], []
    for i, entry in enumerate(encoders):
        if isinstance(entry, TextEncoder):
            parts.append(entry)
            uses.append("both")
            continue
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise KitError(f"text encoder 'concat': entry {i} has no 'name'; write {{name: t5, ...}}")
        options = {key: value for key, value in entry.items() if key not in ("name", "use")}
        use = entry.get("use", "both")
        if use not in USES:
            raise KitError(f"text encoder 'concat': entry {i}: {unknown('use', use, USES)}")
        try:
            parts.append(create(entry["name"], **options))
        except KitError as error:
            raise KitError(f"text encoder 'concat': entry {i}: {error}") from error
        if use == "pooled" and parts[-1].pooled_dim is None:
            raise KitError(f"text encoder 'concat': entry {i} ({entry['name']}) has no pooled vector to use")
        uses.append(use)
    return parts, uses

"""What the transformers over text and picture together share: options, heads, packing of patches.

Axes: b batch, c channels, h w picture in patches, m text tokens, n patches, d width, a heads, p patch side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.heads import join_heads
from imagen_kit.errors import KitError, unknown


class JointAttention(nn.Module):
    """Every token of text and picture attends to all of them; queries, keys and values come ready-made.

    A module without parameters, so that guidance can find the attention of a block and change it.
    """

    is_self_attention = True  # read by guidance that changes layers

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Three of (b, a, m + n, d/a), mask (b, m + n) bool → (b, m + n, d)."""
        return join_heads(attention(q, k, v, mask))


class VectorEmbedder(nn.Module):
    """Linear–SiLU–Linear on a vector, such as the pooled text."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim) → (b, out)."""
        return self.mlp(x)


def joint_mask(mask: Tensor | None, patches: int) -> Tensor | None:
    """The text's mask (b, m), with all patches attended to: (b, m + n)."""
    if mask is None:
        return None
    return torch.cat([mask, mask.new_ones(len(mask), patches)], dim=1)


def to_patches(x: Tensor, p: int) -> Tensor:
    """(b, c, h·p, w·p) → (b, h·w, c·p·p)."""
    cells = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # b c h p w p
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(x: Tensor, h: int, w: int, p: int, channels_first: bool = False) -> Tensor:
    """(b, h·w, p·p·c), with ``channels_first`` (b, h·w, c·p·p), → (b, c, h·p, w·p)."""
    if channels_first:
        cells = x.unflatten(1, (h, w)).unflatten(3, (-1, p, p)).permute(0, 3, 1, 4, 2, 5)
    else:
        cells = x.unflatten(1, (h, w)).unflatten(3, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)
    return cells.flatten(4).flatten(2, 3)  # b c h p w p → b c h·p w·p


def initialise(network: nn.Module) -> None:
    """Xavier for matrices, zero for their biases, 0.02 for the embeddings of times and vectors (DiT, §3.2)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a matrix in the shape of a convolution
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TimestepEmbedder | VectorEmbedder):
            nn.init.normal_(module.mlp[0].weight, std=0.02)  # type: ignore[arg-type]
            nn.init.normal_(module.mlp[2].weight, std=0.02)  # type: ignore[arg-type]


def chosen(what: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options over their defaults; KitError for one there is not."""
    for name in given or {}:
        if name not in defaults:
            raise KitError(unknown(what, name, defaults))
    return {**defaults, **(given or {})}


def check_sizes(kind: str, width: int, heads: int, **counts: int) -> None:
    """KitError for numbers below 1 and for a width that its heads do not divide."""
    for name, value in (("width", width), ("heads", heads), *counts.items()):
        if value < 1:
            raise KitError(f"{kind} {name} must be at least 1, not {value}")
    if width % heads:
        raise KitError(f"{kind} width {width} must be a multiple of heads ({heads})")

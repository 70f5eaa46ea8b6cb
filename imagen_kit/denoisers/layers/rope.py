"""Rotary positions on several axes (Su et al. 2021; on rows and columns as in FLUX).

Axes: b batch, n tokens, a heads, d head width, k axes of position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines (n, d/2)


def picture_places(texts: int, h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """(texts + h·w, 3): zeros for every text token, (0, row, column) for every cell, row by row."""
    rows = torch.arange(h, device=device, dtype=torch.float32)[:, None].expand(h, w)
    columns = torch.arange(w, device=device, dtype=torch.float32)[None].expand(h, w)
    cells = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([cells.new_zeros(texts, 3), cells])


def rotation(places: Tensor, widths: Sequence[int], theta: float = 10_000.0) -> Rotation:
    """Cosines and sines (n, d/2) of the angles of tokens at ``places`` (n, k).

    Axis j turns the next ``widths[j]`` of a head's d numbers, pair i of them by place · theta^(-2i / widths[j]).
    """
    angles = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=places.device) / width
        angles.append(places[:, axis, None] * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """x (b, a, n, d) with each pair (2i, 2i + 1) of its last axis turned, in float32."""
    cos, sin = turn
    pairs = x.float().unflatten(-1, (-1, 2))
    if (
        not torch.compiler.is_compiling()
    ):  # as complex numbers in one pass; compilers fuse the plain form instead
        return (
            torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
        )
    even, odd = pairs.unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)


def default_widths(head_dim: int) -> list[int]:
    """An eighth of a head for the first axis, the rest shared by rows and columns: FLUX's 16, 56, 56 of 128."""
    pairs = head_dim // 2
    first = pairs // 8
    first += (pairs - first) % 2
    return [2 * first, pairs - first, pairs - first]

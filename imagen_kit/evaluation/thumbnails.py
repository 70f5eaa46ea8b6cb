"""Small pictures of results, as text that fits into JSON and HTML.

Axes: n pictures or samples, c h w.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 96  # pixels of a thumbnail, at most
CELLS = 64  # of the grid that points are counted on
LEVELS = 1e-3, 0.5  # share of the fullest cell that first shows, and exponent of the grey


def strip(results: Tensor, count: int, pictures: bool) -> dict[str, Any] | None:
    """The first results side by side in one file: ``count``, ``side`` and ``data`` (a data URI).

    Pictures become a JPEG (small ones a PNG) of ``count`` thumbnails; points in the plane one PNG of
    their density; pictures of
    an analytic problem, in [-1, 1], are shown as pictures.

    Args:
        results: (n, 3, h, w) in [0, 1] for pictures; else (n, 2) or (n, 3, h, w).
        count: most thumbnails; 0 = none.
        pictures: whether they are in [0, 1].

    Returns:
        None for none, and for results that cannot be shown.
    """
    if count < 1:
        return None
    if results.ndim == 2 and results.shape[1] == 2:
        return _file(density(results)[None], "PNG")
    if results.ndim == 4 and results.shape[1] == 3:
        shown = results[:count].float() if pictures else results[:count].float() / 2 + 0.5
        if shown.shape[-1] > SIDE:
            shown = F.interpolate(shown, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return _file(shown, "JPEG" if shown.shape[-1] > 32 else "PNG")
    return None


def density(points: Tensor, reach: float = 3.0) -> Tensor:
    """(n, 2) points → (3, CELLS, CELLS) grey picture of where they lie in [-reach, reach]², y up, in [0, 1]."""
    place = ((points.double() / reach + 1) / 2 * CELLS).floor()
    inside = ((place >= 0) & (place < CELLS)).all(1)
    x, y = place[inside].long().unbind(1)
    counts = torch.bincount((CELLS - 1 - y) * CELLS + x, minlength=CELLS * CELLS).reshape(CELLS, CELLS)
    share = counts / counts.max().clamp(min=1)
    grey = torch.where(share > LEVELS[0], share.pow(LEVELS[1]), 0)
    return (1 - grey).float().expand(3, -1, -1)


def _file(shown: Tensor, kind: str) -> dict[str, Any]:
    from PIL import Image

    side = shown.shape[-1]
    row = torch.cat(list(shown.clamp(0, 1)), dim=-1)
    picture = Image.fromarray(row.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"count": len(shown), "side": side, "data": f"data:image/{kind.lower()};base64,{text}"}

"""Connected regions of binary pictures, a whole batch at once.

Each row is cut into runs of foreground pixels; runs that touch a run of the row above are joined by
vectorised label propagation with pointer jumping, so the cost grows with the runs, not with Python loops.
Axes: b pictures, h rows, w columns, k regions, r runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Regions:
    """4-connected regions of a batch of masks, in reading order.

    Attributes:
        labels: (b, h, w) int64, 0 outside, 1..k inside (numbered through the whole batch).
        picture: (k,) index of the picture a region lies in.
        area: (k,) pixels.
        box: (k, 4) left, top, right, bottom in pixels, right and bottom exclusive.
    """

    labels: Tensor
    picture: Tensor
    area: Tensor
    box: Tensor

    def __len__(self) -> int:
        return len(self.picture)


def _join(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest node of the tree that each of ``count`` nodes belongs to, for edges a[i]-b[i]."""
    parent = np.arange(count)
    while True:
        low = np.minimum(parent[a], parent[b])
        new = parent.copy()
        np.minimum.at(new, parent[a], low)
        np.minimum.at(new, parent[b], low)
        while not np.array_equal(new, new[new]):
            new = new[new]
        if np.array_equal(new, parent):
            return parent
        parent = new


def _overlaps(
    start: np.ndarray, end: np.ndarray, row: np.ndarray, pitch: int, h: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (run, run of the row above in the same picture) sharing a column; runs are sorted, (r,) each."""
    inner = np.flatnonzero(row % h != 0)
    first = np.searchsorted(end, start[inner] - pitch, side="right")
    last = np.searchsorted(start, end[inner] - pitch, side="left")
    many = last - first  # runs first..last-1 overlap
    a = np.repeat(inner, many)
    offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    return a, np.repeat(first, many) + offset


def regions(mask: Tensor) -> Regions:
    """Label the 4-connected regions of ``mask`` (b, h, w) bool, on the CPU."""
    b, h, w = mask.shape
    pitch = w + 1  # a False column ends every row, so no run crosses into the next one
    flat = np.zeros((b * h, pitch), dtype=np.int8)
    flat[:, :w] = mask.numpy().reshape(b * h, w)
    step = np.diff(flat.reshape(-1), prepend=0)
    start, end = np.flatnonzero(step == 1), np.flatnonzero(step == -1)
    row = start // pitch
    root = _join(len(start), *_overlaps(start, end, row, pitch, h))
    _, label = np.unique(root, return_inverse=True)
    k = int(label.max(initial=-1)) + 1

    width = end - start
    pixel = np.repeat(start - np.cumsum(width) + width, width) + np.arange(width.sum())
    canvas = np.zeros(b * h * pitch, dtype=np.int64)
    canvas[pixel] = np.repeat(label + 1, width)

    box = np.full((4, k), np.iinfo(np.int64).max)
    np.minimum.at(box[0], label, start % pitch)
    np.minimum.at(box[1], label, row % h)
    np.minimum.at(box[2], label, -(end - row * pitch))
    np.minimum.at(box[3], label, -(row % h + 1))
    box[2:] *= -1
    picture = np.zeros(k, dtype=np.int64)
    picture[label] = row // h
    return Regions(
        labels=torch.from_numpy(np.ascontiguousarray(canvas.reshape(b, h, pitch)[:, :, :w])),
        picture=torch.from_numpy(picture),
        area=torch.from_numpy(np.bincount(label, weights=width, minlength=k).astype(np.int64)),
        box=torch.from_numpy(box.T.copy()),
    )


def largest(found: Regions, large: Tensor, most: int) -> Tensor:
    """Indices of at most ``most`` large regions a picture, in reading order; noise has thousands.

    Args:
        found: k regions of b pictures.
        large: (k,) bool, those that count.
        most: how many of a picture are kept.
    """
    order = torch.argsort(found.area, descending=True)
    order = order[large[order]]
    order = order[found.picture[order].argsort(stable=True)]
    owner = found.picture[order]
    first = torch.searchsorted(owner, owner)
    return order[torch.arange(len(order)) - first < most].sort().values

"""Connected regions against scipy's labelling, which shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from imagen_kit.evaluation.regions import regions


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.6, 0.9, 1.0])
def test_same_regions_as_scipy(density):
    # 0.6 is near the percolation threshold of 4-connectivity: long winding regions, the hard case
    mask = torch.rand(5, 23, 31, generator=torch.Generator().manual_seed(1)) < density
    found = regions(mask)
    total = 0
    for i in range(len(mask)):
        expected, count = ndimage.label(mask[i].numpy())
        labels = found.labels[i].numpy()
        pairs = np.unique(np.stack([expected.ravel(), labels.ravel()]), axis=1)
        assert pairs.shape[1] == len(np.unique(expected))  # a one-to-one renaming
        assert len(np.unique(labels[labels > 0])) == count
        for k, box in enumerate(ndimage.find_objects(expected), start=1):
            name = labels[expected == k][0] - 1
            rows, columns = box
            assert found.box[name].tolist() == [columns.start, rows.start, columns.stop, rows.stop]
            assert found.area[name] == (expected == k).sum()
            assert found.picture[name] == i
        total += count
    assert len(found) == total


def test_spiral_is_one_region():
    n = 41
    mask = torch.zeros(1, n, n, dtype=torch.bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0, 0] = True
    for length in [n - 1, *(k for k in range(n - 1, 1, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[0, y, x] = True
        dy, dx = dx, -dy
    assert ndimage.label(mask[0].numpy())[1] == 1
    assert len(regions(mask)) == 1
    assert regions(mask).area.item() == mask.sum()

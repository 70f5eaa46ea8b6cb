"""Thumbnails hold the pictures they are of."""

from __future__ import annotations

import base64
import io
import mmap
import time

import numpy as np
import torch
from PIL import Image

from imagen_kit.evaluation.memory import INTERVAL, STATM, PeakMemory
from imagen_kit.evaluation.thumbnails import CELLS, SIDE, density, strip


def opened(made):
    kind, text = made["data"].split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    assert kind == f"data:image/{picture.format.lower()}"
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def test_pictures_stand_side_by_side():
    pictures = torch.rand(5, 3, 16, 16)
    made = strip(pictures, 3, pictures=True)
    assert (made["count"], made["side"]) == (3, 16)
    # small ones are kept as they are, in 8 bits
    assert (opened(made) - torch.cat(list(pictures[:3]), -1)).abs().max() <= 0.5 / 255 + 1e-6
    large = strip(torch.full((2, 3, 128, 128), 0.25), 4, pictures=True)
    assert (large["count"], large["side"]) == (2, SIDE)
    assert (opened(large) - 0.25).abs().max() < 0.02  # JPEG


def test_what_an_analytic_problem_shows():
    made = strip(torch.full((2, 3, 16, 16), -1.0, dtype=torch.float64), 2, pictures=False)
    assert opened(made).max() == 0  # -1 is black
    points = strip(torch.zeros(9, 2), 4, pictures=False)
    assert points["count"] == 1
    assert strip(torch.zeros(9, 5), 4, pictures=False) is None
    assert strip(torch.zeros(9, 2), 0, pictures=False) is None


def test_density_is_dark_where_points_are():
    points = torch.tensor([[-2.9, 2.9]] * 4 + [[2.9, -2.9], [100.0, 0.0]])
    shown = density(points)[0]
    assert shown[0 + 1, 1] == 0  # the fullest cell: top left
    assert shown[CELLS - 2, CELLS - 2] == 0.5  # a quarter of it, in the root's scale
    assert (shown < 1).sum() == 2  # what lies outside is not shown
    assert density(torch.full((3, 2), 50.0)).min() == 1


def test_peak_memory_sees_what_was_freed_again():
    size = 64 * 2**20
    with PeakMemory("cpu") as nothing:
        pass
    # Pages of its own: a tensor might be put where freed ones were, which the process still holds.
    with PeakMemory("cpu") as peak, mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        time.sleep(10 * INTERVAL)
    if STATM.exists():
        assert (
            peak.bytes - nothing.bytes > 0.9 * size
        )  # what the process frees meanwhile is less than a tenth
    with PeakMemory("meta") as untold:
        pass
    assert untold.bytes is None

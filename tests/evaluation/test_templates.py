"""Silhouettes against closed-form areas and centroids."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit.evaluation.templates import fit, templates

_R = 0.5 / math.sin(math.radians(72))  # of a five-pointed star of width 1
AREAS = {  # of the shape whose bounding box has its longer side 1
    "circle": [math.pi / 4],
    "square": [1.0],
    "diamond": [0.5],
    "triangle": [math.sqrt(3) / 4, 0.5],
    "ring": [math.pi / 4 * (1 - hole**2) for hole in (0.45, 0.5, 0.55)],
    "cross": [2 * w - w * w for w in (0.28, 1 / 3, 0.4)],
    # ten triangles with sides R and r and 36° between them
    "star": [5 * _R * _R * inner * math.sin(math.radians(36)) for inner in (0.382, 0.45)],
}


@pytest.mark.parametrize("shape", AREAS)
def test_area(shape):
    found = [a.item() for a, name in zip(templates().area, templates().shape, strict=True) if name == shape]
    # 256 samples a side: an outline of length L misplaces at most L/512 of area
    assert found == pytest.approx(AREAS[shape], abs=0.008)


def test_centroid_of_triangle_and_symmetry():
    shapes = templates()
    index = shapes.shape.index("triangle")
    height = math.sqrt(3) / 2
    # a third of the height from the base, so a sixth below the middle; tolerance: one sample
    assert shapes.centroid[index, 1].item() == pytest.approx(height / 6, abs=0.005)
    assert shapes.centroid[:, 0].abs().max() < 0.005  # all eight are symmetric left to right


@pytest.mark.parametrize("p", [24, 70])
def test_fit_recovers_shape_place_and_size(p):
    shapes = templates()
    side = torch.full((1,), 0.6 * p)
    left, top = torch.tensor([0.17 * p + 0.3]), torch.tensor([0.21 * p + 0.6])
    for v, name in enumerate(shapes.shape):
        coverage = shapes.coverage(v, left, top, side, p)
        assert coverage.sum().item() == pytest.approx((shapes.area[v] * side**2).item(), rel=1e-4)
        best = fit(coverage, torch.ones_like(coverage))
        assert shapes.shape[best.variant.item()] == name
        assert best.misfit.item() < 1e-4
        assert best.side.item() == pytest.approx(side.item(), rel=1e-3)
        assert best.x.item() == pytest.approx(left.item() + side.item() / 2, abs=0.05)
        assert best.y.item() == pytest.approx(top.item() + side.item() / 2, abs=0.05)

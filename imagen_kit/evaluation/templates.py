"""Ideal silhouettes to compare a picture with, drawn from corner points and inequalities.

They are made here and not taken from the renderer, so that a fault in one cannot hide in the other. Where
the words leave room (how sharp a star is, how thick a cross) a shape has variants; any of them is that shape.
Axes: v variants, n objects, s samples along a side, p pixels along a window's side.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES = 256  # per side of a template; one sample is a sixth of a pixel for the largest object at 128 px


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Even-odd rule: a point is inside when a ray to the right crosses the outline an odd number of times."""
    inside = torch.zeros(torch.broadcast_shapes(x.shape, y.shape), dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _star_corners(inner: float) -> list[tuple[float, float]]:
    radii = [1.0, inner] * 5
    angles = [math.pi * i / 5 for i in range(10)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _cross_corners(half: float) -> list[tuple[float, float]]:
    quarter = [(half, -1.0), (half, -half), (1.0, -half)]
    corners: list[tuple[float, float]] = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def _two_lobed_heart(x: Tensor, y: Tensor) -> Tensor:
    tip = _polygon(x, y, [(0, -1), (1, 0), (0, 1), (-1, 0)])
    return tip | ((x.abs() - 0.5) ** 2 + (y + 0.5) ** 2 <= 0.5)


def _curved_heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = 1.2 * x, -1.2 * y
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


@dataclass(frozen=True)
class Templates:
    """Silhouettes scaled so that the longer side of the bounding box is 1, its centre at the origin.

    Attributes:
        shape: name of each variant, v strings.
        integral: (v, s+1, s+1) summed-area tables over [-1/2, 1/2]²; the last entry is the area.
        centroid: (v, 2) x and y of the centre of mass.
    """

    shape: tuple[str, ...]
    integral: Tensor
    centroid: Tensor

    @property
    def area(self) -> Tensor:
        """(v,) areas in squares of the longer side."""
        return self.integral[:, -1, -1]

    def coverage(self, variant: int, left: Tensor, top: Tensor, side: Tensor, p: int) -> Tensor:
        """How much of each pixel the silhouette covers, exact up to the sampling of the template.

        Args:
            variant: which silhouette.
            left, top: (n,) corner of the silhouette's unit square in pixels of the window.
            side: (n,) longer side of the bounding box in pixels.
            p: side of the window in pixels.

        Returns:
            (n, p, p) in [0, 1].
        """
        edges = torch.arange(p + 1, dtype=side.dtype)
        u, v = ((edges - start[:, None]) / side[:, None] * 2 - 1 for start in (left, top))
        n = len(side)
        grid = torch.stack([u[:, None, :].expand(n, p + 1, p + 1), v[:, :, None].expand(n, p + 1, p + 1)], -1)
        table = self.integral[variant][None, None]
        sums = F.grid_sample(
            table, grid.reshape(1, n * (p + 1), p + 1, 2), padding_mode="border", align_corners=True
        ).reshape(n, p + 1, p + 1)
        return sums.diff(dim=1).diff(dim=2) * side[:, None, None] ** 2


@functools.cache
def templates() -> Templates:
    """All variants of the eight shapes."""
    t = torch.linspace(-1.25, 1.25, 1001, dtype=torch.float64)
    x, y = t[None, :], t[:, None]
    everything = torch.ones(len(t), len(t), dtype=torch.bool)
    disc = x**2 + y**2
    drawn: list[tuple[str, Tensor]] = [
        ("circle", disc <= 1),
        ("square", everything & (x.abs() <= 1) & (y.abs() <= 1)),
        ("diamond", x.abs() + y.abs() <= 1),
        ("heart", _two_lobed_heart(x, y)),
        ("heart", _curved_heart(x, y)),
    ]
    # Equilateral, and as high as wide.
    drawn += [
        ("triangle", _polygon(x, y, [(0, -h / 2), (1, h / 2), (-1, h / 2)])) for h in (math.sqrt(3), 2.0)
    ]
    drawn += [("star", _polygon(x, y, _star_corners(inner))) for inner in (0.382, 0.45)]
    drawn += [("ring", (disc <= 1) & (disc >= hole**2)) for hole in (0.45, 0.5, 0.55)]
    drawn += [("cross", _polygon(x, y, _cross_corners(half))) for half in (0.28, 1 / 3, 0.4)]

    masks = torch.stack([_normalise(mask) for _, mask in drawn])
    cell = 1 / SAMPLES
    table = F.pad(masks.cumsum(1).cumsum(2) * cell**2, (1, 0, 1, 0))
    centre = (torch.arange(SAMPLES) + 0.5) * cell - 0.5
    mass = masks.sum((1, 2))
    centroid = torch.stack([(masks.sum(axis) * centre).sum(1) / mass for axis in (1, 2)], 1)
    return Templates(tuple(name for name, _ in drawn), table.float(), centroid.float())


def _normalise(mask: Tensor) -> Tensor:
    """Resample a drawn silhouette so that the longer side of its box fills SAMPLES, centred; float64."""
    rows, columns = mask.any(1).nonzero().squeeze(1), mask.any(0).nonzero().squeeze(1)
    y0, y1, x0, x1 = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
    longer = max(y1 - y0, x1 - x0)
    offset = ((torch.arange(SAMPLES) + 0.5) / SAMPLES - 0.5) * longer
    row, column = (((lo + hi) / 2 + offset).floor().long() for lo, hi in ((y0, y1), (x0, x1)))
    return mask.double()[row.clamp(0, len(mask) - 1)][:, column.clamp(0, len(mask) - 1)]


@dataclass(frozen=True)
class Fit:
    """How silhouettes suit objects: (n,) each; lengths in pixels of the window.

    Attributes:
        variant: index of the silhouette.
        misfit: squared error over the object's area, at the degree of blur that suits it best.
        side: longer side of the bounding box.
        x, y: centre of the bounding box.
    """

    variant: Tensor
    misfit: Tensor
    side: Tensor
    x: Tensor
    y: Tensor


def fit(coverage: Tensor, weight: Tensor) -> Fit:
    """The silhouette that suits each object best.

    Large windows are first compared at half the resolution, and only each object's best few in full.

    Args:
        coverage: (n, p, p) how much of each pixel of a window the object covers; p even.
        weight: (n, p, p) how much a pixel's error counts.
    """
    n, p, _ = coverage.shape
    many = len(templates().shape)
    wanted = torch.ones(n, many, dtype=torch.bool)
    if p >= 60:
        covered, weighed = (F.avg_pool2d(field[:, None], 2)[:, 0] for field in (coverage, weight))
        rough = torch.stack([_suit(covered, weighed, v).misfit for v in range(many)], 1)
        wanted = rough <= rough.kthvalue(3, dim=1, keepdim=True).values
    columns = {key: torch.full((n,), torch.inf) for key in ("misfit", "side", "x", "y")}
    variant = torch.zeros(n, dtype=torch.long)
    for v in range(many):
        rows = wanted[:, v].nonzero().squeeze(1)
        found = _suit(coverage[rows], weight[rows], v)
        better = found.misfit < columns["misfit"][rows]
        variant[rows[better]] = v
        for key, column in columns.items():
            column[rows[better]] = getattr(found, key)[better]
    return Fit(variant, **columns)


def _suit(coverage: Tensor, weight: Tensor, variant: int) -> Fit:
    """One silhouette against all objects.

    Area and centre of mass, which blur does not move, fix its size and place; what is left is its error.
    """
    n, p, _ = coverage.shape
    area = coverage.sum((1, 2)).clamp(min=1)
    at = torch.arange(p) + 0.5
    mass_x, mass_y = (coverage.sum(1) * at).sum(1) / area, (coverage.sum(2) * at).sum(1) / area
    shapes = templates()
    side = (area / shapes.area[variant]).sqrt()
    x, y = mass_x - shapes.centroid[variant, 0] * side, mass_y - shapes.centroid[variant, 1] * side
    ideal = shapes.coverage(variant, x - side / 2, y - side / 2, side, p)
    misfit = torch.full((n,), torch.inf)
    blurs = 1 if p < 40 else 3  # up to 1.2 pixels, less where an arm is three pixels wide
    for blur in range(blurs + 1):
        if blur:
            ideal = _soften(ideal)
        misfit = torch.minimum(misfit, ((coverage - ideal) ** 2 * weight).sum((1, 2)) / area)
    return Fit(torch.full((n,), variant), misfit, side, x, y)


def _soften(picture: Tensor) -> Tensor:
    """Binomial 3 × 3 blur (standard deviation 0.71 pixels) of (n, p, p)."""
    for axis in (1, 2):
        picture = picture / 2 + (picture.roll(1, axis) + picture.roll(-1, axis)) / 4
    return picture

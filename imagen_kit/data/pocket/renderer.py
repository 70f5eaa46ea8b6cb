"""Scenes → pictures by signed distances, vectorised over the batch, at any resolution and on any device.

Coordinates are fractions of the picture's side, x to the right, y down. Each shape is an implicit function of
(x, y) around the centre of its bounding box, for a bounding box whose longer side is 1; distances are exact near
the outline, so that coverage = clamp(1/2 - distance/pixel, 0, 1) is the antialiased edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from imagen_kit.data.pocket.scenes import SceneBatch
from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, COLORS, SHAPES, SIZES

SIZE_JITTER = 0.03
SINGLE_JITTER = 0.15  # of the middle, both axes
ALONG_JITTER = 0.02  # of 1/4 and 3/4, along the relation
ACROSS_JITTER = 0.10  # of the middle, across the relation


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.5


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.5, 0.5)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    # Equilateral of side 1, apex up; its bounding box is 1 × sqrt(3)/2.
    height = math.sqrt(3) / 2
    slanted = x.abs() * height - (y + height / 2) * 0.5
    return torch.maximum(slanted, y - height / 2)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Pentagram, tip up: 10 equal sectors folded onto one, whose edge is the line from the tip to the inner corner.
    radius = 0.5 / math.sin(math.radians(72))  # width 2 R sin 72° = 1
    inner = radius * math.sin(math.radians(18)) / math.sin(math.radians(54))
    y = y - radius * (1 - math.cos(math.radians(36))) / 2  # the bounding box's centre → the star's
    angle = torch.atan2(x, -y)
    sector = math.radians(72)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    r = torch.hypot(x, y)
    across, along = r * torch.sin(angle), r * torch.cos(angle)
    corner = (inner * math.sin(sector / 2), inner * math.cos(sector / 2))
    edge = (corner[0], corner[1] - radius)
    length = math.hypot(*edge)
    return (across * -edge[1] + (along - radius) * edge[0]) / length


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.375).abs() - 0.125  # hole half as wide as the ring


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1 / 6, 0.5), _box(x, y, 0.5, 1 / 6))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # A square of side a on its tip and a half disc on each of its two upper sides; width a (1 + 1/sqrt(2)) = 1.
    a = 1 / (1 + math.sqrt(0.5))
    y = y - a * (0.5 + math.sqrt(1 / 8) - math.sqrt(0.5)) / 2  # the bounding box's centre → the square's
    x = x.abs()
    tip = (x + y.abs()) * math.sqrt(0.5) - a / 2
    lobe = torch.hypot(x - a * math.sqrt(1 / 8), y + a * math.sqrt(1 / 8)) - a / 2
    return torch.minimum(tip, lobe)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 0.5) * math.sqrt(0.5)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "diamond": _diamond,
}


def place(batch: SceneBatch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw where the objects stand: centres (b, 2, 2) as (x, y) and bounding-box sides (b, 2), in picture sides."""
    b = len(batch)
    u = torch.rand(b, 7, generator=generator) * 2 - 1  # always seven numbers a picture, whatever it shows
    u = u.to(batch.relation.device)
    single = 0.5 + SINGLE_JITTER * u[:, :2]
    along = torch.stack([0.25 + ALONG_JITTER * u[:, 2], 0.75 + ALONG_JITTER * u[:, 3]], 1)
    first_is_second = (batch.relation == 1) | (batch.relation == 3)  # right of, below
    along = torch.where(first_is_second[:, None], along.flip(1), along)
    across = 0.5 + ACROSS_JITTER * u[:, :2]
    horizontal = (batch.relation < 2)[:, None]
    x, y = torch.where(horizontal, along, across), torch.where(horizontal, across, along)
    pair = torch.stack([x, y], 2)
    centre = torch.where((batch.relation < 0)[:, None, None], single[:, None, :].expand(b, 2, 2), pair)
    sides = torch.tensor(list(SIZES.values()), device=u.device)[batch.size]
    return centre, sides * (1 + SIZE_JITTER * u[:, 5:7])


def render(batch: SceneBatch, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (b, 3, size, size) in [-1, 1], float32, on the batch's device.

    Args:
        batch: what to draw.
        size: side in pixels.
        generator: CPU generator for positions and the ±3 % of size; the same one gives the same layout at any
            resolution, so a low-resolution picture and its high-resolution partner are two calls.
    """
    centre, sides = place(batch, generator)
    return draw(batch, size, centre, sides)


def draw(batch: SceneBatch, size: int, centre: Tensor, sides: Tensor) -> Tensor:
    """``render`` with the positions given: centres (b, 2, 2), bounding-box sides (b, 2)."""
    device = centre.device
    grid = (torch.arange(size, device=device) + 0.5) / size
    exists = torch.stack([torch.ones_like(batch.relation, dtype=torch.bool), batch.relation >= 0], 1)
    picture, slot = exists.nonzero(as_tuple=True)  # one row an object
    shape = batch.shape[picture, slot]
    c, s = centre[picture, slot], sides[picture, slot]
    x = ((grid[None, :] - c[:, :1]) / s[:, None])[:, None, :].expand(-1, size, size)
    y = ((grid[None, :] - c[:, 1:]) / s[:, None])[:, :, None].expand(-1, size, size)
    distance = x.new_empty(x.shape)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        distance[rows] = DISTANCES[name](x[rows], y[rows])
    coverage = (0.5 - distance * (s * size)[:, None, None]).clamp_(0, 1)

    colors = torch.tensor(list(COLORS.values()), device=device) / 127.5 - 1
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1
    ground = grounds[batch.background][:, :, None, None]
    contrast = (colors[batch.color[picture, slot]] - grounds[batch.background[picture]])[:, :, None, None]
    # Objects do not overlap, so their contributions to the background simply add.
    out = ground.expand(-1, -1, size, size).contiguous()
    return out.index_add_(0, picture, contrast * coverage[:, None])

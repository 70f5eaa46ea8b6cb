"""Reads pictures of the pocket world back and says which attributes are right.

Classical vision, independent of the generator and of the renderer: the background from the border, objects as
connected regions that differ from it, a colour from each region's solid pixels, shape and size by fitting
silhouettes to the region's coverage. What fits nothing within the stated limits is read as None, which is
wrong for every caption: the judge rather misses a right picture than passes a wrong one.
Axes: b pictures, h w pixels (h = w), n objects, p pixels along a window's side, v silhouettes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_kit.data.pocket.scenes import Scene
from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, COLORS, SIZES
from imagen_kit.errors import KitError
from imagen_kit.evaluation.regions import Regions, largest, regions
from imagen_kit.evaluation.templates import fit, templates

ATTRIBUTES = ("background", "count", "color", "shape", "size", "relation", "all")


@dataclass(frozen=True)
class Limits:
    """What still counts as right. Lengths and areas are fractions of the picture's side and area.

    Attributes:
        contrast: RGB distance from the background (each channel in [0, 1]) that makes a pixel foreground.
        color: largest distance in Oklab to a word's colour; the two closest words are 0.16 apart.
        opacity: smallest contrast of an object with its background, relative to the word's colour.
        stain: largest distance of the local mean of the background from the border's colour.
        size: largest relative error of the bounding box's longer side.
        misfit: largest squared error of an object's coverage against its silhouette, over the object's area.
            Two different shapes of the pocket world differ by 0.10 or more at 128 px.
        foreign: largest share of an object's pixels that have another colour.
        speck: smallest region that counts as an object, its area weighed by contrast; the rest is clutter.
        clutter: largest weighed area of all clutter together.
    """

    contrast: float = 0.16
    color: float = 0.075
    opacity: float = 0.78
    stain: float = 0.10
    size: float = 0.12
    misfit: float = 0.07
    foreign: float = 0.05
    speck: float = 0.0015
    clutter: float = 0.004


@dataclass(frozen=True)
class Seen:
    """One object of a picture; a word is None when nothing fits.

    Attributes:
        size, color, shape: words of the pocket vocabulary.
        x, y: centre of the bounding box, fractions of the side, y down.
        side: longer side of the bounding box, fraction of the picture's side.
        misfit: squared error against the best silhouette, over the object's area; inf when none was tried.
    """

    size: str | None
    color: str | None
    shape: str | None
    x: float
    y: float
    side: float
    misfit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        background: word, or None when the ground is stained or of no known colour.
        objects: the four largest at most, in reading order of their regions.
        count: number of regions large enough to be objects; -1 when specks clutter the picture.
        relation: where the first object stands from the second; None unless there are exactly two.
    """

    background: str | None
    objects: tuple[Seen, ...]
    count: int
    relation: str | None


def oklab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1], last axis 3 → Oklab (Ottosson 2020), where Euclidean distance is about perceptual."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    lms = (linear @ rgb.new_tensor(to_lms).T).clamp(min=0) ** (1 / 3)
    return lms @ rgb.new_tensor(to_lab).T


def _nearest(rgb: Tensor, words: dict[str, tuple[int, int, int]], limit: float) -> tuple[Tensor, Tensor]:
    """Index of the nearest word's colour for (n, 3) colours, and whether it lies within the limit."""
    palette = torch.tensor(list(words.values()), dtype=rgb.dtype) / 255
    distance, index = torch.cdist(oklab(rgb.clamp(0, 1)), oklab(palette)).min(1)
    return index, distance <= limit


def _group_median(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Median of each column of values (m, c) within each group (m,); NaN for empty groups. (groups, c)"""
    count = torch.bincount(group, minlength=groups)
    middle = count.cumsum(0) - count + (count - 1).clamp(min=0) // 2
    columns = []
    for column in values.T:
        by_value = column.argsort()
        order = by_value[group[by_value].argsort(stable=True)]
        picked = (
            column[order[middle.clamp(max=max(len(order) - 1, 0))]]
            if len(order)
            else column.new_zeros(groups)
        )
        columns.append(torch.where(count > 0, picked, torch.nan))
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class _Objects:
    """Regions large enough to be objects: window corners, coverage and shares, one row an object."""

    picture: Tensor  # (n,)
    left: Tensor  # (n,) of the window
    top: Tensor
    coverage: Tensor  # (n, p, p), 0 off the object
    weight: Tensor  # (n, p, p), 0 where another object's edge mixes in
    foreign: Tensor  # (n,) share of pixels of another colour
    color: Tensor  # (n, 3)


class Judge:
    """Reads pictures of the pocket world.

    Args:
        limits: what still counts as right.
    """

    #: Larger pictures are averaged down to this side; no attribute needs more.
    working_side = 128

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()

    def read(self, images: Tensor) -> list[Reading]:
        """What each picture shows.

        Args:
            images: (b, 3, h, h) in [0, 1], h at least 16, any floating dtype and device.

        Raises:
            KitError: another shape, or values that are not finite.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] != images.shape[3]
            or images.shape[2] < 16
        ):
            raise KitError(
                f"the judge reads square pictures (b, 3, h, h) with h >= 16, not {tuple(images.shape)}"
            )
        out: list[Reading] = []
        for part in images.split(64):
            picture = part.detach().to("cpu", torch.float32)
            if not torch.isfinite(picture).all():
                raise KitError("the judge was given a picture that is not finite (NaN or inf)")
            if picture.shape[-1] > self.working_side:
                picture = F.interpolate(picture, size=(self.working_side,) * 2, mode="area")
            out += self._read(picture.clamp(0, 1))
        return out

    def score(self, images: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Which attributes of each picture are right.

        With two objects the pairing that makes most attributes right is taken, so swapped colours count
        against colour alone and swapped places against the relation alone.

        Args:
            images: (b, 3, h, h) in [0, 1].
            scenes: b scenes.

        Returns:
            (b,) bool tensors under each name of ``ATTRIBUTES``.
        """
        if len(images) != len(scenes):
            raise KitError(f"{len(images)} pictures cannot be scored against {len(scenes)} scenes")
        rows = [
            compare_reading(reading, scene) for reading, scene in zip(self.read(images), scenes, strict=True)
        ]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.bool) for name in ATTRIBUTES}

    def _read(self, picture: Tensor) -> list[Reading]:
        b, _, h, _ = picture.shape
        edge = max(1, h // 32)
        ring = torch.ones(h, h, dtype=torch.bool)
        ring[edge:-edge, edge:-edge] = False
        ground = picture[:, :, ring].median(-1).values  # (b, 3)
        difference = picture - ground[:, :, None, None]
        contrast = _length(difference, 1)
        found = self._regions(contrast)
        index, near = _nearest(ground, BACKGROUNDS, self.limits.color)
        clean = self._stain(difference, found.labels > 0) <= self.limits.stain
        names = tuple(BACKGROUNDS)
        grounds = [
            names[i] if ok else None for i, ok in zip(index.tolist(), (near & clean).tolist(), strict=True)
        ]

        # Contrast 1/2, about the least of any word on any ground, weighs as one pixel: faint noise weighs
        # little, and the half pixel taken off each region makes single pixels of it weigh nothing.
        weight = torch.bincount(
            found.labels.reshape(-1), weights=contrast.reshape(-1), minlength=len(found) + 1
        )[1:]
        weight = (2 * weight - 0.5).clamp(min=0)
        large = weight >= self.limits.speck * h * h
        count = torch.bincount(found.picture[large], minlength=b)
        clutter = torch.bincount(found.picture[~large], weights=weight[~large], minlength=b) / h**2
        counts: list[int] = torch.where(clutter > self.limits.clutter, -1, count).tolist()
        seen: list[list[Seen]] = [[] for _ in range(b)]
        objects = self._objects(difference, contrast, found, large)
        for picture_index, thing in self._recognise(objects, ground, h):
            seen[picture_index].append(thing)
        return [
            Reading(grounds[i], tuple(seen[i]), counts[i], _relation(seen[i]) if counts[i] == 2 else None)
            for i in range(b)
        ]

    def _regions(self, contrast: Tensor) -> Regions:
        """Foreground regions; one that spans two objects is cut at its thinnest line near the middle."""
        h = contrast.shape[-1]
        mask = contrast > self.limits.contrast
        found = regions(mask)
        # Two neighbours may stand 0.007 of the side apart, a fifth of a pixel at 32 px. Together they are
        # at least 0.7 long, and a straight line near the picture's middle parts them.
        extent = found.box[:, 2:] - found.box[:, :2]
        long = (extent.max(1).values >= 0.6 * h) & (extent.min(1).values <= 0.8 * h)
        if not long.any():
            return found
        low, high = int(0.46 * h), int(0.54 * h) + 1
        for k in long.nonzero().squeeze(1).tolist():
            i = int(found.picture[k])
            inside = contrast[i] * (found.labels[i] == k + 1)
            horizontal = bool(extent[k, 0] >= extent[k, 1])
            profile = inside.sum(0 if horizontal else 1)
            line = low + int(profile[low:high].argmin())
            (mask[i, :, line] if horizontal else mask[i, line]).fill_(False)
        return regions(mask)

    def _stain(self, difference: Tensor, foreground: Tensor) -> Tensor:
        """(b,) largest distance of the background's local mean from the border's colour, clear of objects."""
        h = difference.shape[-1]
        window = 2 * (h // 48) + 1 if h >= 48 else 3
        reach = window + 2 * max(1, h // 64)  # the window's half on each side plus the blur of an edge
        near = _grow(foreground, reach // 2)
        mean = F.avg_pool2d(difference, window, 1, window // 2, count_include_pad=False)
        mean = _length(mean, 1)
        return torch.where(near, 0.0, mean).amax((1, 2))

    def _objects(self, difference: Tensor, contrast: Tensor, found: Regions, large: Tensor) -> _Objects:
        """Cut a window around each object and turn colours into coverage."""
        h = contrast.shape[-1]
        keep = largest(found, large, most=4)
        color = _solid_color(difference, contrast, found)[keep]  # relative to the background
        box, picture = found.box[keep].float(), found.picture[keep]
        p = 2 * int(0.26 * h) + 4  # no object of a known size is longer; even
        left, top = (((box[:, i] + box[:, i + 2] - p) / 2).round().long() for i in (0, 1))
        span = torch.arange(p)
        rows, columns = top[:, None] + span + p, left[:, None] + span + p
        padded = F.pad(difference, (p, p, p, p))
        labels = F.pad(found.labels, (p, p, p, p))
        window = padded.permute(0, 2, 3, 1)[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
        label = labels[picture[:, None, None], rows[:, :, None], columns[:, None, :]]

        own = label == keep[:, None, None] + 1
        other = (label > 0) & ~own
        square = (color**2).sum(1).clamp(min=1e-6)[:, None, None]
        coverage = torch.einsum("nijc,nc->nij", window, color) / square
        off = _length(window - coverage[..., None] * color[:, None, None, :], -1)
        odd = own & ((off > 0.15) | (coverage > 1.4))
        # An antialiased or blurred edge reaches beyond the region; the next object's edge must stay out.
        reach = 1 + h // 64
        rim = _grow(own, reach)
        mixed = rim & _grow(other, reach)
        covered = torch.where((own | (rim & (label == 0) & ~mixed)), coverage, 0.0)
        return _Objects(
            picture=picture,
            left=left,
            top=top,
            coverage=covered,
            weight=(~mixed | own).float(),
            foreign=odd.sum((1, 2)) / own.sum((1, 2)).clamp(min=1),
            color=color,
        )

    def _recognise(self, objects: _Objects, ground: Tensor, h: int) -> list[tuple[int, Seen]]:
        """Words, places and sizes of the objects, each with the index of its picture."""
        if len(objects.picture) == 0:
            return []
        limits = self.limits
        base = ground[objects.picture]
        color, near = _nearest(base + objects.color, COLORS, limits.color)
        word = torch.tensor(list(COLORS.values())) / 255
        opaque = objects.color.norm(dim=1) >= limits.opacity * (word[color] - base).norm(dim=1)
        color_right = near & opaque & (objects.foreign <= limits.foreign)

        best = fit(objects.coverage, objects.weight)
        side = best.side / h
        x, y = (best.x + objects.left) / h, (best.y + objects.top) / h
        size_error = (side[:, None] / torch.tensor(list(SIZES.values())) - 1).abs().min(1)
        names, sizes, colors = templates().shape, tuple(SIZES), tuple(COLORS)
        out = []
        for i in range(len(objects.picture)):
            fits = bool(best.misfit[i] <= limits.misfit)
            thing = Seen(
                size=sizes[int(size_error.indices[i])] if size_error.values[i] <= limits.size else None,
                color=colors[int(color[i])] if color_right[i] else None,
                shape=names[int(best.variant[i])] if fits and objects.foreign[i] <= limits.foreign else None,
                x=float(x[i]),
                y=float(y[i]),
                side=float(side[i]),
                misfit=float(best.misfit[i]),
            )
            out.append((int(objects.picture[i]), thing))
        return out


def _grow(mask: Tensor, reach: int) -> Tensor:
    """Dilate (n, h, w) by a square of ``reach`` pixels to each side, one axis at a time."""
    size = 2 * reach + 1
    wide = F.max_pool2d(mask[:, None].float(), (1, size), 1, (0, reach))
    return F.max_pool2d(wide, (size, 1), 1, (reach, 0))[:, 0] > 0


def _length(vectors: Tensor, axis: int) -> Tensor:
    # Several times faster than torch's vector norm along a short axis.
    return vectors.square().sum(axis).sqrt()


def _solid_color(difference: Tensor, contrast: Tensor, found: Regions) -> Tensor:
    """(k, 3) median of the 30 % of a region's pixels that differ most from the ground, so not an edge's."""
    picture, row, column = (found.labels > 0).nonzero(as_tuple=True)
    label = found.labels[picture, row, column] - 1
    strength = contrast[picture, row, column]
    by_strength = strength.argsort(descending=True)
    order = by_strength[label[by_strength].argsort(stable=True)]
    first = found.area.cumsum(0) - found.area
    rank = torch.arange(len(order)) - first[label[order]]
    order = order[rank < (0.3 * found.area[label[order]]).ceil()]
    values = difference[picture[order], :, row[order], column[order]]
    return _group_median(values, label[order], len(found))


def _relation(things: list[Seen]) -> str | None:
    """Where the first of two objects stands from the second; None when neither axis is clearly the longer."""
    dx, dy = things[0].x - things[1].x, things[0].y - things[1].y
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < 0.3 or along < 1.5 * across:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}


def compare_reading(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Attribute by attribute, does the reading agree with the scene? Keys are ``ATTRIBUTES``."""
    count = reading.count == len(scene.objects)
    pairings = [reading]
    if count and len(scene.objects) == 2:
        turned = replace(reading, objects=reading.objects[::-1], relation=_OPPOSITE[reading.relation])
        # The pairing whose relation is right comes first and so wins a tie.
        pairings = sorted([reading, turned], key=lambda r: r.relation != scene.relation)
    candidates = []
    for option in pairings:
        right = {"background": reading.background == scene.background, "count": count}
        for attribute in ("color", "shape", "size"):
            right[attribute] = count and all(
                getattr(seen, attribute) == getattr(asked, attribute)
                for seen, asked in zip(option.objects, scene.objects, strict=True)
            )
        right["relation"] = count and option.relation == scene.relation
        right["all"] = all(right.values())
        candidates.append(right)
    return max(candidates, key=lambda right: sum(right.values()))

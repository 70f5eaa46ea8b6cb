"""The geometry that the pocket domain fixes, measured on rendered pictures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from imagen_kit.data.pocket import Obj, Scene, SceneBatch, draw, place, render, sample_batch
from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES

SIDE = 400  # pixels; large enough to measure geometry to a quarter of a per cent


def single(shape, color="red", size="large", background="white"):
    return Scene((Obj(size, color, shape),), background)


def silhouette(shape: str, x=0.5, y=0.5, side=0.5) -> torch.Tensor:
    """(SIDE, SIDE) coverage of one black-on-white shape."""
    batch = SceneBatch.of([single(shape)])
    picture = draw(batch, SIDE, torch.tensor([[[x, y]] * 2]), torch.full((1, 2), side))[0]
    ground, red = torch.ones(3), torch.tensor(COLORS["red"]) / 127.5 - 1
    return ((picture - ground[:, None, None]) * (red - ground)[:, None, None]).sum(0) / (
        red - ground
    ).square().sum()


def box(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask as fractions of the side."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return tuple(v.item() / SIDE for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_bounding_box(shape):
    left, top, right, bottom = box(silhouette(shape, 0.45, 0.55) > 0.02)
    # to two pixels of 400: a tip thinner than a pixel shows faintly
    assert max(right - left, bottom - top) == pytest.approx(0.5, abs=0.006)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((0.45, 0.55), abs=0.004)


AREAS = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": math.sqrt(3) / 4,
    "ring": math.pi / 4 * 0.75,  # the hole is half as wide
    "diamond": 0.5,
}


@pytest.mark.parametrize("shape", AREAS)
def test_area(shape):
    assert silhouette(shape).mean().item() / 0.25 == pytest.approx(AREAS[shape], rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_upright_and_filled(shape):
    cover = silhouette(shape)
    assert torch.allclose(cover, cover.flip(1), atol=1e-4)  # left and right alike
    solid = ((cover > 0.99) | (cover < 0.01)).float().mean()
    assert solid > 0.96  # flat inside, nothing outside: only the outline is in between
    centre = cover[SIDE // 2, SIDE // 2].item()
    assert centre == pytest.approx(0.0 if shape == "ring" else 1.0, abs=1e-4)


def test_triangle_and_star_point_up_and_the_heart_down():
    def width(shape, height):
        return (silhouette(shape)[round((0.5 + 0.5 * height) * SIDE)] > 0.5).sum().item() / SIDE / 0.5

    assert width("triangle", -0.40) < 0.1 < 0.9 < width("triangle", 0.40)
    assert width("star", -0.44) < 0.1  # one tip at the top, two feet at the bottom
    assert (silhouette("star")[round(0.72 * SIDE)] > 0.5).int().diff().abs().sum() == 4
    assert width("heart", 0.42) < 0.2 < 0.7 < width("heart", -0.25)
    assert (silhouette("heart")[round(0.285 * SIDE)] > 0.5).int().diff().abs().sum() == 4  # two lobes


def test_star_has_five_tips_and_the_cross_four_arms():
    def crossings(shape, radius, y=0.5):
        angle = torch.linspace(0, 2 * math.pi, 3601)[:-1]
        columns = ((0.5 + radius * torch.sin(angle)) * SIDE).long()
        rows = ((y - radius * torch.cos(angle)) * SIDE).long()
        inside = silhouette(shape)[rows, columns] > 0.5
        return (inside != inside.roll(1)).sum().item() // 2

    radius = 0.5 * 0.5 / math.sin(math.radians(72))
    middle = 0.5 + (radius - radius * math.cos(math.radians(36))) / 2  # of the circle through the tips
    assert crossings("star", 0.75 * radius, middle) == 5
    assert crossings("cross", 0.23) == 4


def test_colours_are_exact():
    for color, rgb in COLORS.items():
        for background, ground in BACKGROUNDS.items():
            picture = render(SceneBatch.of([single("square", color, "large", background)]), 32)
            assert ((picture[0, :, 16, 16] + 1) * 127.5).tolist() == pytest.approx(rgb, abs=1e-3)
            assert ((picture[0, :, 0, 0] + 1) * 127.5).tolist() == pytest.approx(ground, abs=1e-3)


def test_places_keep_to_the_rules():
    batch = sample_batch(4000, torch.Generator().manual_seed(0), "all")
    centre, sides = place(batch, torch.Generator().manual_seed(1))
    nominal = torch.tensor(list(SIZES.values()))[batch.size]
    error = (sides / nominal - 1).abs()
    assert 0.028 < error.max() <= 0.03 + 1e-6
    alone = batch.relation < 0
    assert 0.14 < (centre[alone, 0] - 0.5).abs().max() <= 0.15 + 1e-6
    for index, relation in enumerate(RELATIONS):
        first, second = centre[batch.relation == index].unbind(1)
        axis = 0 if relation in ("left of", "right of") else 1
        low, high = (first, second) if relation in ("left of", "above") else (second, first)
        assert 0.019 < (low[:, axis] - 0.25).abs().max() <= 0.02 + 1e-6
        assert 0.019 < (high[:, axis] - 0.75).abs().max() <= 0.02 + 1e-6
        across = torch.stack([low[:, 1 - axis], high[:, 1 - axis]])
        assert 0.09 < (across - 0.5).abs().max() <= 0.10 + 1e-6


def test_objects_lie_inside_the_picture_and_do_not_touch():
    # the extreme of every rule at once
    scenes = [
        Scene((Obj("large", "red", a), Obj("large", "blue", b)), "white", relation)
        for a, b in zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True)
        for relation in ("left of", "above")
    ]
    batch = SceneBatch.of(scenes)
    horizontal = (batch.relation == 0)[:, None, None]
    sides = torch.full((len(scenes), 2), 0.44 * 1.03)

    def pictures(first, second):
        along = torch.tensor([[first], [second]]).expand(len(scenes), 2, 1)
        across = torch.tensor([[0.4], [0.6]]).expand(len(scenes), 2, 1)
        places = torch.where(horizontal, torch.cat([along, across], 2), torch.cat([across, along], 2))
        return draw(batch, SIDE, places, sides)

    apart = pictures(0.23, 0.77)
    for edge in (apart[..., 0], apart[..., -1], apart[..., 0, :], apart[..., -1, :]):
        # 1.4 pixels are left, and antialiasing reaches 1.6 pixels beyond the star's tip of 36°, faintly; an
        # object that reached the border would differ by 1 or more in some channel
        assert (edge - 1).abs().max() < 0.3
    close = pictures(0.27, 0.73)
    for picture, scene in zip(close, scenes, strict=True):
        profile = ((picture - 1).abs() > 0.5).any(0).any(0 if scene.relation == "left of" else 1)
        assert not profile[SIDE // 2 - 1 : SIDE // 2 + 1].any()  # a clear line between them


def test_edges_are_antialiased_by_coverage():
    batch = sample_batch(24, torch.Generator().manual_seed(3), "all")
    fine = render(batch, 512, torch.Generator().manual_seed(4))
    for size in (32, 64):
        coarse = render(batch, size, torch.Generator().manual_seed(4))
        ideal = F.avg_pool2d(fine, 512 // size)
        # the same layout at any resolution; distance-based coverage errs at sharp tips only
        assert (coarse - ideal).abs().mean() < 0.004
        assert ((coarse - ideal).abs().amax(1) > 0.25).float().mean() < 0.005


def test_layout_depends_on_the_generator_alone():
    batch = sample_batch(6, torch.Generator().manual_seed(0), "all")
    first, again, other = (render(batch, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1


def test_the_second_slot_of_a_single_object_is_not_drawn():
    batch = SceneBatch.of([single("circle")])
    picture = render(batch, 64, torch.Generator().manual_seed(0))
    batch.shape[0, 1], batch.color[0, 1] = 1, 3
    assert torch.equal(render(batch, 64, torch.Generator().manual_seed(0)), picture)

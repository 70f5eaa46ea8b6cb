from __future__ import annotations

import pytest
import torch

from imagen_kit.errors import KitError
from imagen_kit.guidance.step import Step

GRID = (80.0, 10.0, 2.5, 0.5, 0.0)
PLACES = {90.0: 0.0, 80.0: 0.0, 45.0: 0.5, 10.0: 1.0, 2.5: 2.0, 1.0: 2.75, 0.5: 3.0, 0.0: 4.0, -1.0: 4.0}


def test_places_are_whole_at_the_grid_and_linear_between():
    for t, place in PLACES.items():
        assert Step(t, 1.0, t, GRID).place == pytest.approx(place)
        assert Step(t, 1.0, t, GRID).progress == pytest.approx(place / 4)
    assert all(Step(t, 1.0, t, GRID).place == i for i, t in enumerate(GRID))  # exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_times_and_of_grids_give_the_same(dtype):
    t = torch.tensor(list(PLACES), dtype=dtype).reshape(-1, 1, 1, 1)
    expected = torch.tensor(list(PLACES.values()), dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert torch.allclose(Step(t, t, t, GRID).place, expected, atol=1e-12)
    each = torch.tensor([GRID] * len(PLACES), dtype=torch.float64)
    assert torch.allclose(Step(t, t, t, each).place, expected, atol=1e-12)
    turned = Step(t[:2], t[:2], t[:2], torch.tensor([GRID, (100.0, 90.0, 80.0, 70.0, 60.0)])).place
    assert turned.flatten().tolist() == [0.0, 2.0]


def test_times_that_passed_through_float32_are_the_grid_s():
    grid = (0.9, 0.7, 0.3, 0.1)
    t = torch.tensor(grid[:3])  # float32
    assert Step(t, t, t, grid).place.flatten().tolist() == [0.0, 1.0, 2.0]
    assert Step(t.reshape(-1, 1), t, t, torch.tensor([grid] * 3)).place.shape == (3, 1)


def test_without_a_grid_it_is_said_what_to_do():
    with pytest.raises(KitError, match=r"denoise = denoise\.begin\(times="):
        Step(0.5, 0.5, 0.5).on("progress")

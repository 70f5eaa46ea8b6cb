"""How many of a run's pictures a sampler holds at once: its history, whatever the number of steps."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules

SIDE = 60  # 3·60² numbers are too many for the arena, which holds all of a small run in one buffer
HISTORY = 4  # the longest that any sampler's update reads, in predictions


def most_held(name: str, steps: int) -> int:
    """Predictions of a run that are there at the same time, the one just made included."""
    schedule = schedules.create("flow" if name.startswith("flow") else "scaled_linear")
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def denoise(x: Tensor, t: float | Tensor) -> Tensor:
        nonlocal most
        x0 = 0.5 * x
        made.append(weakref.ref(x0))
        most = max(most, sum(ref() is not None for ref in made))
        return x0

    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        samplers.create(name).sample(denoise, x, schedule, steps, noise=lambda: torch.randn_like(x))
    assert len(made) >= min(steps, 6)
    return most


@pytest.mark.parametrize("name", [name for name in samplers.names() if name != "dpm_adaptive"])
def test_a_run_holds_its_history_and_no_more(name):
    few, many = (most_held(name, steps) for steps in (8, 24))
    assert few == many <= HISTORY

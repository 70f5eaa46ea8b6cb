"""Published lists of steps: DeepFloyd IF's ``smart``, ``super`` and ``fast`` spacings.

Each divides the times into sections of equal length, from the clean end up, and says how many steps lie evenly in
each of them, both ends of a section included (the respacing of Nichol & Dhariwal 2021; the numbers are those of
deep-floyd/IF).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from imagen_kit.errors import KitError
from imagen_kit.schedules.base import Schedule

SECTIONS = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
#: Steps of each list: what a sampler of this spacing takes where it is not told.
LENGTHS = {name: sum(counts) for name, counts in SECTIONS.items()}


def times(name: str, count: int) -> list[int]:
    """The list ``name`` on a schedule of ``count`` times, noisiest first.

    Raises:
        KitError: a section of the schedule is shorter than its number of steps.
    """
    counts, first, rising = SECTIONS[name], 0, []
    for i, steps in enumerate(counts):
        length = count // len(counts) + (i < count % len(counts))
        if length < steps:
            raise KitError(f"spacing {name!r} needs a schedule of more than {count} times, such as 1000")
        stride = (length - 1) / max(steps - 1, 1)
        # summed up, not multiplied: half-way between two times the last digit decided what was published
        rising += [first + round(place) for place in accumulate([0.0, *[stride] * (steps - 1)])]
        first += length
    return rising[::-1]


def _spacing(name: str, schedule: Schedule, steps: int, closed: bool, options: Any) -> np.ndarray:
    if not schedule.discrete:
        raise KitError(f"spacing {name!r} is a list of whole times; schedule {schedule.name!r} is continuous")
    if steps + closed != LENGTHS[name]:
        wanted = LENGTHS[name] - closed
        raise KitError(
            f"spacing {name!r} is a list of {LENGTHS[name]} times: steps must be {wanted}, not {steps}"
        )
    return np.array(times(name, schedule.discrete), dtype=np.float64)


SPACINGS: dict[str, Callable[..., np.ndarray]] = {name: partial(_spacing, name) for name in SECTIONS}

"""IF's lists of steps against the lists that diffusers holds, and where they cannot be."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.step_lists import LENGTHS, SECTIONS, times

COSINE = schedules.create("cosine", timesteps=1000)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_lists_are_the_published_ones(name: str) -> None:
    library = importlib.util.find_spec("diffusers")
    if library is None or library.origin is None:
        pytest.skip("needs diffusers")
    file = Path(library.origin).parent / "pipelines" / "deepfloyd_if" / "timesteps.py"
    published = runpy.run_path(str(file))[f"{name}_timesteps"]  # without importing all of the library
    assert times(name, 1000) == published
    assert LENGTHS[name] == len(published)


def test_one_list_written_out() -> None:
    assert times("fast27", 1000)[:6] == [999, 800, 799, 600, 599, 500]
    # seven sections of 142 or 143 times with 7, 4, 2, 1, 2, 4, 7 steps
    assert times("smart27", 1000)[10:17] == [715, 714, 572, 429, 428, 286, 285]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_sampler_takes_the_whole_list(name: str) -> None:
    sampler = samplers.create("ddpm", spacing=name)
    points = sampler.points(COSINE)
    assert [point.t for point in points[:-1]] == times(name, 1000)
    assert points[-1].sigma == 0
    assert sampler.points(COSINE, LENGTHS[name]) == points
    ending = samplers.create("ddim", spacing=name, final="sigma_min").points(COSINE, LENGTHS[name] - 1)
    assert [point.t for point in ending] == times(name, 1000)
    # on other schedules the sections are as long as they divide it
    assert len(set(times(name, 4000))) == LENGTHS[name]


def test_what_cannot_be() -> None:
    with pytest.raises(KitError, match="list of 100 times: steps must be 100, not 50"):
        samplers.create("ddpm", spacing="smart100").points(COSINE, 50)
    with pytest.raises(KitError, match="schedule 'flow' is continuous"):
        samplers.create("ddim", spacing="smart27").points(schedules.create("flow"))
    with pytest.raises(KitError, match="needs a schedule of more than 100 times"):
        samplers.create("ddpm", spacing="smart185").points(schedules.create("linear", timesteps=100))
    with pytest.raises(KitError, match="did you mean 'smart100'"):
        samplers.create("ddpm", spacing="smart10")

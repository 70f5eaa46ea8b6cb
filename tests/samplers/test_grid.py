"""Spacings against the published grids, and what a grid must obey."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sampler_oracles import group, run_schedule

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.grid import ALIGNED, SPACINGS, explicit, grid
from imagen_kit.samplers.step_lists import SECTIONS

SD = schedules.create("scaled_linear")


def times(spacing: str, steps: int, final: str = "zero", **options: Any) -> list[float]:
    sampler = samplers.create("ddim", spacing=spacing, final=final, **options)
    return [point.t for point in sampler.points(SD, steps)]


def test_integer_grids() -> None:
    """The three published rules at 5 steps of 1000, written out."""
    assert times("leading", 5)[:-1] == [800, 600, 400, 200, 0]
    assert times("leading", 5, offset=1)[:-1] == [801, 601, 401, 201, 1]
    assert times("trailing", 5)[:-1] == [999, 799, 599, 399, 199]
    assert times("linspace", 5)[:-1] == [999, 749, 500, 250, 0]
    assert times("trailing", 3)[:-1] == [999, 666, 332]


@pytest.mark.parity
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_recorded_integer_grids(spacing: str) -> None:
    runs, tensors = group("ddpm")
    chosen = [run for run in runs if run["config"]["timestep_spacing"] == spacing]
    assert chosen
    for run in chosen:
        sampler = samplers.create("ddpm", spacing=spacing, offset=run["config"].get("steps_offset", 0))
        ours = [point.t for point in sampler.points(run_schedule(run), run["steps"])][:-1]
        assert ours == tensors[f"{run['key']}.timesteps"].tolist(), run["id"]


@pytest.mark.parity
def test_recorded_karras_grid() -> None:
    """DPM-Solver's Karras grid spans the schedule, as ours does."""
    runs, tensors = group("dpmsolver_multistep")
    chosen = [
        run
        for run in runs
        if run["config"].get("use_karras_sigmas") and run["config"]["final_sigmas_type"] == "zero"
    ]
    assert chosen
    for run in chosen:
        sampler = samplers.create("dpmpp_2m", spacing="karras")
        ours = [point.ratio for point in sampler.points(run_schedule(run), run["steps"])][:-1]
        theirs = tensors[f"{run['key']}.eval_sigma"] / tensors[f"{run['key']}.eval_alpha"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_log_snr_and_karras_are_even_in_what_they_say() -> None:
    points = grid(SD, 9, "log_snr", "sigma_min")
    np.testing.assert_allclose(
        np.diff([p.lam for p in points]), (points[-1].lam - points[0].lam) / 9, rtol=1e-9
    )
    roots = [p.ratio ** (1 / 7) for p in grid(SD, 9, "karras", "sigma_min")]
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 9, rtol=1e-9)


@pytest.mark.parametrize(
    ("spacing", "final", "closed", "wanted"),
    [
        ("linspace", "zero", True, [999, 749, 500, 250, 0]),
        ("linspace", "sigma_min", None, [999, 749, 500, 250, 0]),
        ("linspace", "zero", None, [999, 666, 333, 0, 0]),
        ("leading", "zero", True, [801, 601, 401, 201, 0]),
        ("leading", "sigma_min", True, [801, 601, 401, 201, 0]),
        ("leading", "sigma_min", False, [751, 501, 251, 1, 0]),
        ("leading", "zero", False, [751, 501, 251, 1, 0]),
    ],
)
def test_the_end_counts_among_the_times_or_not(
    spacing: str, final: str, closed: bool | None, wanted: list[float]
) -> None:
    offset = 1 if spacing == "leading" else 0
    points = samplers.create("ddim", spacing=spacing, final=final, closed=closed, offset=offset).points(SD, 4)
    assert [point.t for point in points] == wanted
    assert points[-1].sigma == (0 if final == "zero" else SD.alpha_sigma(0.0)[1])


def test_closed_is_a_choice_or_left_open() -> None:
    with pytest.raises(KitError, match=r"'closed' must be true, false or null, not 1"):
        samplers.create("ddim", closed=1)
    with pytest.raises(KitError, match="t=0 is followed by t=0"):  # from offset 0 it would lead nowhere
        samplers.create("ddim", spacing="leading", final="sigma_min", closed=False).points(SD, 4)


def test_a_grid_that_comes_to_the_clean_end_counts_it() -> None:
    flow = schedules.create("flow", t_min=0.0, t_max=1.0)
    for spacing in ("linspace", "leading"):
        open_times, closed_times = (
            [p.t for p in grid(flow, 4, spacing, end)] for end in ("zero", "sigma_min")
        )
        assert open_times == closed_times
    assert [p.t for p in grid(flow, 4, "linspace", "zero")] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_sd3_shifts_twice() -> None:
    """Its published code in two lines: even between the ends of the shifted levels, and shifted."""

    def shifted(t: Any) -> Any:
        return 3 * t / (1 + 2 * t)

    wanted = shifted(np.linspace(shifted(1.0), shifted(0.001), 7))
    flow = schedules.create("flow", shift=3.0, t_min=0.0, t_max=1.0)
    np.testing.assert_allclose([p.t for p in grid(flow, 7, "sd3", "zero")], [*wanted, 0.0], rtol=1e-12)


def test_flow_shift_moves_the_grid() -> None:
    plain = [p.t for p in grid(schedules.create("flow", t_min=0.0, t_max=1.0), 4, "trailing", "zero")]
    moved = [
        p.t for p in grid(schedules.create("flow", shift=3.0, t_min=0.0, t_max=1.0), 4, "trailing", "zero")
    ]
    assert plain == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert moved == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", sorted(set(SPACINGS) - set(SECTIONS)))
@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow", "sigmoid"])
def test_every_grid_falls(schedule: str, spacing: str, final: str) -> None:
    made = schedules.create(schedule)
    for steps in (1, 2, 3, 7, 20, 50, 333):
        points = grid(made, steps, spacing, final)
        assert len(points) == steps + 1
        assert all(after.lam > before.lam for before, after in pairwise(points))
        if final == "zero":
            assert (points[-1].alpha, points[-1].sigma) == (1.0, 0.0)
        else:
            assert points[-1].t == made.t_min
        assert made.t_min <= points[0].t <= made.t_max
        if steps == 1 and (spacing, final) != ("leading", "sigma_min"):  # half-way, by its published rule
            assert points[0].ratio > 10  # never at the clean end


def test_a_grid_of_all_times() -> None:
    assert times("trailing", 1000)[:-1] == times("leading", 1000)[:-1] == list(range(999, -1, -1))
    with pytest.raises(KitError, match=r"steps must be at most 1000 .* not 1001"):
        times("leading", 1001)


def test_explicit_grids_end_where_they_should() -> None:
    flow = schedules.create("flow")
    to_clean = explicit(flow, [0.9, 0.5], None, "zero")
    assert [(p.alpha, p.sigma) for p in to_clean][-1] == (1.0, 0.0)
    assert len(to_clean) == 3
    assert [p.t for p in explicit(flow, [0.9, 0.5], None, "sigma_min")] == [0.9, 0.5]
    # a grid that ends at sigma = 0 itself is not extended
    assert [p.t for p in explicit(flow, [0.9, 0.5, 0.0], None, "zero")] == [0.9, 0.5, 0.0]
    assert [p.sigma for p in explicit(flow, None, [1.0, 0.0], "zero")] == [0.5, 0.0]
    assert [p.t for p in explicit(flow, None, torch.tensor([9.0, 1.0]), "sigma_min")] == pytest.approx(
        [0.9, 0.5]
    )
    assert explicit(flow, None, [math.inf, 1.0], "zero")[0].t == 1.0


@pytest.mark.parametrize(
    ("timesteps", "sigmas", "rule"),
    [
        (None, None, "either as timesteps or as sigmas"),
        ([0.5], [0.5], "either as timesteps or as sigmas"),
        ([], None, "at least one step"),
        ([0.5, 0.5], None, "fall strictly"),
        ([0.2, 0.5], None, "fall strictly"),
        ([1.5, 0.5], None, r"time 1.5 lies outside schedule 'flow', which spans \[0, 1\]"),
        ([math.nan, 0.5], None, "time nan lies outside"),
        (None, [-1.0], "must not be negative"),
    ],
)
def test_grids_that_cannot_be(timesteps: Any, sigmas: Any, rule: str) -> None:
    with pytest.raises(KitError, match=rule):
        explicit(schedules.create("flow"), timesteps, sigmas, "zero")


def test_beta_spacing_is_even_in_the_distribution() -> None:
    """Times are quantiles of Beta(0.6, 0.6): its distribution function brings them back to an even grid."""
    special = pytest.importorskip("scipy.special")

    def shares(final: str, steps: int) -> np.ndarray:
        return special.betainc(0.6, 0.6, [point.t / 999 for point in grid(SD, steps, "beta", final)])

    np.testing.assert_allclose(shares("sigma_min", 12), np.linspace(1, 0, 13), atol=1e-12)
    np.testing.assert_allclose(shares("zero", 4)[:-1], [1, 0.75, 0.5, 0.25], atol=1e-12)
    gaps = -np.diff([point.t for point in grid(SD, 12, "beta", "sigma_min")])
    assert gaps[0] < gaps[6] > gaps[-1]  # denser at both ends
    # Through the schedule's shift, as every spacing in time.
    flow = schedules.create("flow", shift=3.0, t_min=0.0, t_max=1.0)
    plain = schedules.create("flow", t_min=0.0, t_max=1.0)
    moved = [3 * p.t / (1 + 2 * p.t) for p in grid(plain, 5, "beta", "sigma_min")]
    assert [p.t for p in grid(flow, 5, "beta", "sigma_min")] == pytest.approx(moved)


@pytest.mark.parametrize(
    ("spacing", "model", "schedule"),
    [
        ("align_your_steps", "sd15", SD),
        ("align_your_steps_sdxl", "sdxl", SD),
        ("align_your_steps", "svd", schedules.create("edm", sigma_min=0.002, sigma_max=700.0)),
    ],
)
def test_aligned_steps_are_the_published_lists(spacing: str, model: str, schedule: Any) -> None:
    ratios = [point.ratio for point in grid(schedule, 10, spacing, "sigma_min")]
    np.testing.assert_allclose(ratios, ALIGNED[model], rtol=1e-6)  # the lists have ten digits
    # The authors replace the list's last level by 0.
    open_ratios = [point.ratio for point in grid(schedule, 10, spacing, "zero")]
    np.testing.assert_allclose(open_ratios, [*ALIGNED[model][:-1], 0], rtol=1e-6)


def test_aligned_steps_are_interpolated_in_the_logarithm() -> None:
    ratios = [point.ratio for point in grid(SD, 20, "align_your_steps", "sigma_min")]
    np.testing.assert_allclose(ratios[::2], ALIGNED["sd15"], rtol=1e-6)
    middle = [math.sqrt(a * b) for a, b in pairwise(ratios[::2])]
    np.testing.assert_allclose(ratios[1::2], middle, rtol=1e-9)


def test_aligned_steps_stretch_to_other_schedules() -> None:
    flow = schedules.create("flow")
    logs = np.log([point.ratio for point in grid(flow, 10, "align_your_steps", "sigma_min")])
    listed = np.log(ALIGNED["sd15"])
    shape = (listed - listed[-1]) / (listed[0] - listed[-1])
    np.testing.assert_allclose((logs - logs[-1]) / (logs[0] - logs[-1]), shape, atol=1e-9)


@pytest.mark.parity
def test_aligned_lists_are_those_of_diffusers() -> None:
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    names = {
        "sd15": "StableDiffusionSigmas",
        "sdxl": "StableDiffusionXLSigmas",
        "svd": "StableDiffusionVideoSigmas",
    }
    for model, name in names.items():  # three decimals there, of other digits than the authors' own list
        np.testing.assert_allclose(ALIGNED[model][:-1], utils.AysSchedules[name][:-1], rtol=1e-3, atol=2e-3)

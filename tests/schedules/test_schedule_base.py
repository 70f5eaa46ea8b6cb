"""What holds for every schedule: one row a schedule, judged against identities and recorded tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from imagen_kit import schedules
from imagen_kit.errors import KitError
from imagen_kit.schedules.base import DiscreteSchedule, Schedule

TABLES = Path(__file__).parents[1] / "data" / "schedules.safetensors"

#: One row a way to make a schedule: name, options, factor of its time embedding, whether alpha² + sigma² = 1.
ROWS: dict[str, tuple[str, dict[str, Any], float, bool]] = {
    "linear": ("linear", {}, 1.0, True),
    "scaled_linear": ("scaled_linear", {}, 1.0, True),
    "cosine": ("cosine", {}, 1000.0, True),
    "cosine-shifted": ("cosine", {"shift": 4.0}, 1000.0, True),
    "cosine-discrete": ("cosine", {"timesteps": 1000}, 1.0, True),
    "cosine-discrete-shifted": ("cosine", {"timesteps": 1000, "shift": 4.0}, 1.0, True),
    "sigmoid": ("sigmoid", {}, 1.0, True),
    "sigmoid-continuous": ("sigmoid", {"timesteps": None}, 1000.0, True),
    "edm": ("edm", {}, 1.0, False),
    "flow": ("flow", {}, 1000.0, False),
}


def make(row: str) -> Schedule:
    name, options, _, _ = ROWS[row]
    return schedules.create(name, **options)


def inner_times(schedule: Schedule, count: int = 41) -> torch.Tensor:
    return torch.linspace(schedule.t_min, schedule.t_max, count, dtype=torch.float64)


def test_every_schedule_has_a_row() -> None:
    assert {name for name, *_ in ROWS.values()} == set(schedules.names())


@pytest.mark.parametrize("row", ROWS)
def test_floats_and_tensors(row: str) -> None:
    schedule = make(row)
    times = inner_times(schedule, 12).reshape(3, 4)
    alpha, sigma = schedule.alpha_sigma(times.float())
    assert alpha.shape == sigma.shape == times.shape
    assert alpha.dtype == sigma.dtype == torch.float64
    one = schedule.alpha_sigma(times[1, 2].item())
    assert all(isinstance(value, float) for value in one)
    exact = schedule.alpha_sigma(times)
    assert one == (exact[0][1, 2].item(), exact[1][1, 2].item())
    assert isinstance(schedule.log_snr(times[1, 2].item()), float)
    assert schedule.name == ROWS[row][0]
    assert schedule.time_scale == ROWS[row][2]


@pytest.mark.parametrize("row", ROWS)
def test_noise_rises_with_time(row: str) -> None:
    schedule = make(row)
    alpha, sigma = schedule.alpha_sigma(inner_times(schedule, 999))
    assert (schedule.log_snr(inner_times(schedule, 999)).diff() < 0).all()
    assert (alpha > 0).all()
    assert (sigma > 0).all()
    if ROWS[row][3]:
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
        assert schedule.prior_std(schedule.t_max) == 1.0
    else:
        assert schedule.prior_std(schedule.t_max) == sigma[-1].item()


@pytest.mark.parametrize("row", ROWS)
def test_inverses(row: str) -> None:
    """t_of_log_snr and t_of_ratio undo log_snr and sigma / alpha at real-valued times."""
    schedule = make(row)
    times = inner_times(schedule)[1:-1]
    alpha, sigma = schedule.alpha_sigma(times)
    # Rounding of t by the size of the numbers that log-SNR is made of, relative to t's span.
    span = schedule.t_max - schedule.t_min
    torch.testing.assert_close(
        schedule.t_of_log_snr(schedule.log_snr(times)), times, rtol=0, atol=1e-11 * span
    )
    torch.testing.assert_close(schedule.t_of_ratio(sigma / alpha), times, rtol=0, atol=1e-11 * span)
    one = times[20].item()
    assert schedule.t_of_log_snr(schedule.log_snr(one)) == pytest.approx(one, rel=1e-11)
    log_snr = 2 * (alpha.log() - sigma.log())
    torch.testing.assert_close(schedule.log_snr(times), log_snr, rtol=1e-12, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("table", "schedule"),
    [
        ("sd", schedules.create("scaled_linear", beta_start=0.00085, beta_end=0.012, timesteps=1000)),
        ("ddpm", schedules.create("linear", beta_start=1e-4, beta_end=0.02, timesteps=1000)),
        ("cosine", schedules.create("cosine", timesteps=1000)),
        ("sd_zero_snr", schedules.create("scaled_linear", zero_terminal_snr=True)),
    ],
)
def test_recorded_tables(table: str, schedule: DiscreteSchedule) -> None:
    """alpha and sigma at integer times are those of the peers' tables, to rounding."""
    alpha2 = load_file(TABLES)[f"{table}.alphas_cumprod"]
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000))
    torch.testing.assert_close(alpha, alpha2.sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(sigma, (1 - alpha2).sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.alphas_cumprod, alpha2, rtol=0, atol=1e-14)


def test_discrete_times_between_integers() -> None:
    schedule = schedules.create("linear")
    left, right = schedule.log_snr(10.0), schedule.log_snr(11.0)
    assert schedule.log_snr(10.25) == pytest.approx(0.75 * left + 0.25 * right, rel=1e-14)


def test_outside_its_range_the_inverse_is_the_nearest_end() -> None:
    schedule = schedules.create("linear")
    assert schedule.t_of_log_snr(100.0) == 0.0
    assert schedule.t_of_log_snr(-100.0) == 999.0
    assert schedule.t_of_ratio(0.0) == 0.0
    assert schedules.create("flow").t_of_ratio(math.inf) == 1.0


def test_zero_terminal_snr() -> None:
    schedule = schedules.create("scaled_linear", zero_terminal_snr=True)
    assert schedule.alpha_sigma(999.0) == (0.0, 1.0)
    assert schedule.log_snr(999.0) == -math.inf
    alpha, _ = schedule.alpha_sigma(torch.tensor([998.0, 998.5, 999.0], dtype=torch.float64))
    assert alpha[1].item() == pytest.approx(alpha[0].item() / 2)  # alpha falls in a straight line at the end
    assert schedule.t_of_log_snr(schedule.log_snr(998.5)) == pytest.approx(998.5)
    assert schedules.create("cosine", zero_terminal_snr=True).alpha_sigma(1.0) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_noise(dtype: torch.dtype) -> None:
    """Coefficients differ along the batch, and tiny sigmas survive half precision."""
    schedule = schedules.create("flow")
    x0 = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    noise = torch.linspace(2, -1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    t = torch.tensor([0.001, 0.75], dtype=torch.float64)
    expected = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    got = schedule.add_noise(x0.to(dtype), noise.to(dtype), t)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("linear", {"beta_start": 0.1, "beta_end": 0.05}, "0 < beta_start <= beta_end < 1"),
        ("linear", {"timesteps": 1}, "'timesteps' must be a whole number of at least 2"),
        ("scaled_linear", {"timesteps": 2.5}, "'timesteps' must be a whole number"),
        ("cosine", {"shift": 0}, "'shift' must be a positive number"),
        ("cosine", {"shft": 1}, "no option 'shft'; did you mean 'shift'"),
        ("sigmoid", {"timesteps": None, "start": 3.0, "end": -3.0}, "start < end"),
        ("edm", {"sigma_min": 100.0}, "sigma_min < sigma_max"),
        ("flow", {"t_max": 1.5}, "0 <= t_min < t_max <= 1"),
        ("flow", {"shift": -1.0}, "'shift' must be a positive number"),
        ("flo", {}, "unknown schedule 'flo'; did you mean 'flow'"),
    ],
)
def test_bad_options_are_told_in_one_line(name: str, options: dict[str, Any], rule: str) -> None:
    with pytest.raises(KitError, match=rule):
        schedules.create(name, **options)

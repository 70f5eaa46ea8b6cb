"""The adaptive DPM-Solver: accuracy by tolerance, independence of the batch, control and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError

DATA = analytic.problem("gmm2d")


def start(schedule: Any, batch: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    first = samplers.create("dpm_adaptive").points(schedule, 20)[0]
    return torch.randn(batch, 2, generator=generator, dtype=torch.float64) * schedule.prior_std(first.t)


def solution(schedule: Any, x: Tensor) -> Tensor:
    """The probability flow to the last level with noise, and x0 from there."""
    points = samplers.create("dpm_adaptive").points(schedule, 20)
    end = analytic.solve_ode(DATA, x, schedule, points[0].t, points[-2].t)
    return DATA.x0(end, points[-2].alpha, points[-2].sigma)


def counted(denoise: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Any]]:
    times: list[Any] = []

    def count(x: Tensor, t: Any) -> Tensor:
        times.append(t)
        return denoise(x, t)

    return count, times


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("schedule_name", ["flow", "edm", "scaled_linear"])
def test_the_error_keeps_to_the_tolerance(schedule_name: str, order: int) -> None:
    schedule = schedules.create(schedule_name)
    x = start(schedule)
    exact, evaluations = solution(schedule, x), []
    for tolerance in (1e-3, 1e-5):
        denoise, times = counted(DATA.denoise(schedule))
        sampler = samplers.create("dpm_adaptive", order=order, rtol=tolerance, atol=tolerance)
        error = (sampler.sample(denoise, x, schedule) - exact).abs().max().item()
        # Errors of the steps add up, and the flow spreads them where components part: by 10 here at most.
        assert error < 10 * tolerance
        assert (len(times) - 1) % order == 0  # whole attempts, and the step to the clean end
        evaluations.append(len(times))
    # A step's error is that of the lower order, h^order: to 1/100 of it with 100^(1/order) as many steps.
    assert evaluations[1] / evaluations[0] == pytest.approx(100 ** (1 / order), rel=0.5)


def test_every_sample_has_its_own_steps() -> None:
    """Alone or in a batch the same numbers, bit for bit, with noise too; times come as (b,)."""
    schedule = schedules.create("flow")
    x = start(schedule)
    sampler = samplers.create("dpm_adaptive", eta=0.7)
    denoise, times = counted(DATA.denoise(schedule))
    seeds = range(len(x))
    whole = sampler.sample(
        denoise, x, schedule, generator=[torch.Generator().manual_seed(seed) for seed in seeds]
    )
    alone = [
        sampler.sample(
            DATA.denoise(schedule), x[i : i + 1], schedule, generator=[torch.Generator().manual_seed(i)]
        )
        for i in seeds
    ]
    assert torch.equal(whole, torch.cat(alone))
    assert all(t.shape == (len(x),) for t in times)
    assert len(times[-4].unique()) > 1, "samples were meant to arrive at different times"


def test_a_grid_for_every_sample() -> None:
    schedule = schedules.create("flow")
    x = start(schedule, 2)
    sampler = samplers.create("dpm_adaptive")
    grids = torch.tensor([[0.9, 0.5, 0.02], [0.8, 0.4, 0.05]], dtype=torch.float64)
    whole = sampler.sample(DATA.denoise(schedule), x, schedule, timesteps=grids)
    for i in range(2):
        one = sampler.sample(DATA.denoise(schedule), x[i : i + 1], schedule, timesteps=grids[i])
        assert torch.equal(whole[i : i + 1], one)


def test_steps_set_the_first_step_only() -> None:
    """The first attempt goes a steps-th of the way; one step to the clean end is the answer."""
    schedule = schedules.create("flow")
    x, sampler = start(schedule), samplers.create("dpm_adaptive", order=2)
    denoise, times = counted(DATA.denoise(schedule))
    sampler.sample(denoise, x, schedule, 8)
    points = sampler.points(schedule, 8)
    half = points[0].lam + (points[-2].lam - points[0].lam) / 8 / 2
    assert schedule.log_snr(times[1][0].item()) / 2 == pytest.approx(half, abs=1e-9)
    ideal = DATA.denoise(schedule)
    one = sampler.sample(ideal, x, schedule, 1)
    torch.testing.assert_close(one, ideal(x, sampler.points(schedule, 1)[0].t), rtol=0, atol=1e-12)


def test_the_controller() -> None:
    """An error of one tolerance keeps the step; p, i, d weigh the errors before as Söderlind's filter does."""
    from imagen_kit.samplers.adaptive import _Adaptive

    def factor(errors: list[float], **options: float) -> tuple[bool, float]:
        sampler = samplers.create("dpm_adaptive", **options)
        run = object.__new__(_Adaptive)
        run.sampler = sampler
        inverse = 1 / torch.tensor(errors, dtype=torch.float64)[:, None]
        accepted, grown = run.control(inverse[0], inverse[1:])
        return bool(accepted), grown.item()

    assert factor([1.0, 1.0, 1.0]) == (True, 1.0)
    assert factor([8.0, 1.0, 1.0]) == (False, pytest.approx(1 + math.atan(0.5 - 1)))
    assert factor([1e-9, 1.0, 1.0])[1] < 1 + math.pi / 2
    pid = {"p": 0.4, "i": 0.3, "d": 0.2}
    expected = 0.5 ** (-0.9 / 3) * 2.0 ** (0.8 / 3) * 3.0 ** (-0.2 / 3)
    assert factor([0.5, 2.0, 3.0], **pid) == (True, pytest.approx(1 + math.atan(expected - 1)))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_callbacks(dtype: torch.dtype, final: str) -> None:
    schedule = schedules.create("flow")
    sampler, seen = samplers.create("dpm_adaptive", final=final), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        return DATA.denoise(schedule)(x, t)

    x = start(schedule).to(dtype)
    out = sampler.sample(denoise, x, schedule, callback=lambda i, x, x0: seen.append((i, x, x0)))
    assert out.dtype == dtype
    assert [i for i, _, _ in seen] == list(range(len(seen)))
    assert torch.equal(seen[-1][1], out)
    assert all(state.dtype == x0.dtype == dtype for _, state, x0 in seen)
    assert out.isfinite().all()


def test_it_says_that_it_has_no_tableau() -> None:
    schedule, sampler = schedules.create("flow"), samplers.create("dpm_adaptive")
    assert samplers.describe("dpm_adaptive")["linear"] is False
    assert sampler.linear is False
    for ask in (lambda: sampler.tableau(schedule, 4), lambda: sampler.nfe(4)):
        with pytest.raises(
            KitError, match=r"sampler 'dpm_adaptive' .*it has no tableau and runs by sample\(\)"
        ):
            ask()
    with pytest.raises(NotImplementedError):  # so that checks before a run can tell it from a fault
        sampler.tableau(schedule, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nfe": 20}, "keeps to tolerances, not to nfe; give rtol and atol"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"timesteps": [1.0, 0.5]}, r"does not fit schedule 'flow' starting at t=1 \(alpha = 0\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    schedule = schedules.create("flow")
    with pytest.raises(KitError, match=message):
        samplers.create("dpm_adaptive").sample(DATA.denoise(schedule), start(schedule), schedule, **arguments)


def test_answers_that_are_not_finite_end_the_run() -> None:
    schedule = schedules.create("flow")
    with pytest.raises(KitError, match="does not reach the end since the network's answers are not finite"):
        samplers.create("dpm_adaptive").sample(lambda x, t: x / 0 - x / 0, start(schedule), schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "option 'order' must be 2 or 3, not 4"),
        ({"atol": 0.0}, "option 'atol' must be a number above 0"),
        ({"accept_safety": 0.1}, "option 'accept_safety' must be a number from"),
        ({"eta": 2.0}, "option 'eta' must be a number from 0 to 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create("dpm_adaptive", **options)

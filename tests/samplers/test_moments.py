"""Stochastic samplers sample: the right distribution, along the right paths.

The data are mixtures of Gaussians in the plane, whose ideal network is a formula. Three kinds of proof:

* distribution: the mean, the second moments and the shares of the components of many samples at large step
  counts, within 5 standard errors (one false alarm in a million; the seed is fixed);
* Gaussian data without sampling: the sampler is linear there, its moments are exact and approach the data's;
* strong consistency: on finer and finer grids along one Brownian path all samplers of one reverse SDE
  approach one and the same solution, path by path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.denoisers.analytic import Gaussian, GaussianMixture
from imagen_kit.samplers.base import Sampler
from imagen_kit.schedules.base import Schedule

FLOW = schedules.create("flow")
#: Unlike components, close enough that samples pass from one to the other.
MIXTURE = GaussianMixture([0.6, 0.4], [[-0.6, 0.2], [0.7, -0.3]], [[0.3, 0.5], [0.4, 0.2]])
GAUSSIAN = Gaussian([0.4, -0.7], [0.5, 0.8])
SAMPLES = 4000
#: Steps of the sampling tests: enough that what is left of a first-order bias is below a standard error.
STEPS = 120


@dataclass(frozen=True)
class Row:
    """A stochastic sampler under test: its options, and the steps it is run with."""

    options: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS


#: Options of every stochastic sampler of the registry; those that sample with a consistency function in
#: place of an ideal network have tests of their own.
ROWS: dict[str, list[Row]] = {
    "ddpm": [Row(), Row({"variance": "fixed_large"}), Row({"variance": 0.5})],
    "ddim": [Row({"eta": 1.0}), Row({"eta": 0.5})],
    "euler_ancestral": [Row(), Row({"eta": 0.5})],
    "dpm2_ancestral": [Row(steps=48)],
    # The noise of a stage has nothing to do with that of its step there: first order, with a large constant.
    "dpmpp_2s": [Row({"eta": 1.0}, 480)],
    "dpmpp_3s": [Row({"eta": 1.0}, 600)],
    "dpmpp_2s_ancestral": [Row(steps=48)],
    "dpmpp_sde": [Row(steps=48), Row({"eta": 0.5, "r": 0.7}, 48)],
    "dpmpp_2m_sde": [Row(), Row({"eta": 0.5})],
    "dpmpp_3m_sde": [Row(), Row({"curvature": "exact", "eta": 0.5})],
    "dpm_solver_2m_sde": [Row()],
    "sa_solver": [
        Row(),
        Row({"tau": 0.5, "predictor_order": 3, "corrector_order": 4}),
        Row({"expands": "noise", "corrector_order": 0}),
        Row({"tau_low": 0.2, "tau_high": 3.0, "corrector_order": 1}),
    ],
    "er_sde": [Row({"scale": scale}) for scale in ("er1", "er2", "er3", "er4", "er5", "sde")],
    "edm": [Row({"s_noise": 1.0}, 64), Row({"s_noise": 1.0, "solver": "euler", "s_churn": 5.0})],
    "restart": [
        Row({"intervals": [[24, 1, 0.1, 2.0]]}, 32),
        Row({"intervals": [[16, 3, 0.2, 2.0], [8, 1, 3.0, 9.0]]}, 32),
    ],
    "dpm_adaptive": [Row({"eta": 1.0, "rtol": 0.01, "atol": 0.002})],
}
DISTILLED = {"lcm", "tcd", "flow_euler"}
CASES = [(name, row) for name, rows in ROWS.items() for row in rows]


def case_id(value: Any) -> str:
    if isinstance(value, Row):
        return "-".join(f"{key}={option}" for key, option in value.options.items()) or "default"
    return str(value)


def test_every_stochastic_sampler_has_a_row() -> None:
    for name in samplers.names():
        stochastic = samplers.describe(name)["stochastic"]
        assert (name in ROWS or name in DISTILLED) == bool(stochastic), name


def start_of(sampler: Sampler, data: GaussianMixture, steps: int, schedule: Schedule = FLOW) -> Tensor:
    """(SAMPLES, 2) exact draws of the noisy data at the grid's first time."""
    first = sampler.points(schedule, steps)[0]
    generator = torch.Generator().manual_seed(5)
    x0 = data.sample(SAMPLES, generator)
    return first.alpha * x0 + first.sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def features(x: Tensor, data: GaussianMixture) -> Tensor:
    """(b, 5 or 6): coordinates, their products, and of a mixture the share of the first component."""
    logits = data.weights.log() - 0.5 * (((x[:, None] - data.means) / data.stds) ** 2).sum(-1)
    share = torch.softmax(logits - data.stds.log().sum(-1), 1)[:, :1]
    products = torch.stack([x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)
    return torch.cat([x, products, share], 1)[:, : 4 + len(data.weights)]


def expected(data: GaussianMixture) -> Tensor:
    """What ``features`` are on average, exactly."""
    second = data.covariance + data.mean[:, None] * data.mean
    values = [*data.mean, second[0, 0], second[1, 1], second[0, 1], data.weights[0]]
    return torch.stack(values)[: 4 + len(data.weights)]


def assert_distribution(x: Tensor, data: GaussianMixture) -> None:
    """The features' means lie within 5 standard errors of their exact values."""
    values = features(x, data)
    z = (values.mean(0) - expected(data)) / (values.std(0) / len(x) ** 0.5)
    assert z.abs().max() < 5, z


@pytest.mark.parametrize(("name", "row"), CASES, ids=case_id)
def test_samples_of_a_mixture(name: str, row: Row) -> None:
    sampler = samplers.create(name, **row.options)
    x = start_of(sampler, MIXTURE, row.steps)
    got = sampler.sample(
        MIXTURE.denoise(FLOW), x, FLOW, row.steps, generator=torch.Generator().manual_seed(8)
    )
    assert_distribution(got, MIXTURE)


def test_what_the_samples_are_judged_by_sees_a_bias() -> None:
    """The exact data pass; moved, widened or reweighted by a tenth of their spread they do not."""
    x = MIXTURE.sample(SAMPLES, torch.Generator().manual_seed(5))
    assert_distribution(x, MIXTURE)
    other = GaussianMixture([0.64, 0.36], MIXTURE.means, MIXTURE.stds)
    worse = (
        x + 0.07,
        (x - x.mean(0)) * 1.1 + x.mean(0),
        other.sample(SAMPLES, torch.Generator().manual_seed(5)),
    )
    for wrong in worse:
        with pytest.raises(AssertionError, match="tensor"):
            assert_distribution(wrong, MIXTURE)


# ---- Gaussian data: exact moments without sampling ---------------------------------------------------------


def exact_moments(sampler: Sampler, schedule: Schedule, steps: int) -> tuple[Tensor, Tensor]:
    """Mean (2,) and covariance (2, 2) of what a linear sampler makes of Gaussian data.

    The sample is affine in the start and in every noise: one row of the batch has none of them, each other
    row a single one at 1. The squares of the responses add up; axes do not mix.
    """
    tableau = sampler.tableau(schedule, steps)
    first = sampler.points(schedule, steps)[0]
    x = (first.alpha * GAUSSIAN.mean).repeat(2 + tableau.noises, 1)
    x[1] += (first.alpha**2 * GAUSSIAN.covariance.diagonal() + first.sigma**2).sqrt()
    one_hot = iter(torch.eye(len(x), dtype=torch.float64)[2:, :, None].expand(-1, -1, 2))
    out = sampler.sample(GAUSSIAN.denoise(schedule), x, schedule, steps, noise=one_hot.__next__)
    return out[0], (out[1:] - out[0]).square().sum(0).diag()


@pytest.mark.parametrize(
    ("name", "row"), [case for case in CASES if case[0] not in ("dpm_adaptive", "restart")], ids=case_id
)
def test_moments_of_gaussian_data(name: str, row: Row) -> None:
    """The error falls with the step: first-order samplers halve it, the others do better.

    ``restart`` has steps of its own besides the grid's, and ``dpm_adaptive`` is not linear.
    """
    schedule = schedules.create("edm")
    sampler = samplers.create(name, **{"spacing": "log_snr", **row.options})
    errors = []
    for steps in (row.steps // 2, row.steps):
        mean, covariance = exact_moments(sampler, schedule, steps)
        assert (mean - GAUSSIAN.mean).abs().max() < 1e-9  # no sampler moves the mean: rounding
        errors.append((covariance - GAUSSIAN.covariance).abs().max().item())
    # 1e-4 is what the step to the clean end leaves; the largest variance is 0.64.
    assert errors[1] < 0.65 * errors[0] + 1e-4, errors
    assert errors[1] < 0.08, errors


# ---- consistency functions in place of an ideal network ----------------------------------------------------


def flow_map(x: Tensor, now: tuple[float, float], then: tuple[float, float]) -> Tensor:
    """The probability flow of Gaussian data from (alpha, sigma) to another, exactly: quantiles are kept."""
    (alpha, sigma), (alpha_then, sigma_then) = now, then
    spread = GAUSSIAN.covariance.diagonal()
    scale = ((alpha_then**2 * spread + sigma_then**2) / (alpha**2 * spread + sigma**2)).sqrt()
    return alpha_then * GAUSSIAN.mean + scale * (x - alpha * GAUSSIAN.mean)


@pytest.mark.parametrize(
    ("name", "options", "schedule_name"),
    [
        ("lcm", {"timestep_scaling": 1e6}, "scaled_linear"),
        ("lcm", {"timestep_scaling": 1e6}, "flow"),
        ("flow_euler", {"stochastic_sampling": True}, "flow"),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_consistency_sampling(name: str, options: dict[str, Any], schedule_name: str, steps: int) -> None:
    """Every step of multistep consistency sampling then gives the data's distribution exactly."""
    schedule = schedules.create(schedule_name)
    sampler = samplers.create(name, **options)
    x = start_of(sampler, GAUSSIAN, steps, schedule)
    got = sampler.sample(
        lambda x, t: flow_map(x, schedule.alpha_sigma(t), (1.0, 0.0)),
        x,
        schedule,
        steps,
        generator=torch.Generator().manual_seed(8),
    )
    assert_distribution(got, GAUSSIAN)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_with_a_trajectory_function(gamma: float) -> None:
    """The same with the flow to the time the sampler goes to, told as the x0 that leads there."""
    schedule = schedules.create("scaled_linear")
    sampler = samplers.create("tcd", gamma=gamma)
    x = start_of(sampler, GAUSSIAN, 4, schedule)
    times = sampler.tableau(schedule, 4).times
    below = {now: math.floor((1 - gamma) * then + 1e-6) for now, then in pairwise(times)}

    def network(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        there = (1.0, 0.0) if t == times[-2] else schedule.alpha_sigma(float(below[t]))
        landed = flow_map(x, (alpha, sigma), there)
        # there_alpha x0 + there_sigma (x - alpha x0) / sigma = landed
        return (landed - there[1] / sigma * x) / (there[0] - there[1] * alpha / sigma)

    got = sampler.sample(network, x, schedule, 4, generator=torch.Generator().manual_seed(8))
    assert_distribution(got, GAUSSIAN)


# ---- strong consistency: one path, finer grids -------------------------------------------------------------

FINEST = 512
LEVELS = (16, 32, 64, 128)
PATHS = 64
#: lambda from ratio 5 to 0.1.
LAMBDAS = np.linspace(-math.log(5.0), -math.log(0.1), FINEST + 1)


def aggregated(noises: Tensor, steps: int, log_decay: Callable[[float], float]) -> list[Tensor]:
    """Unit noises of ``steps`` even steps made of those of the finest grid, as the SDE's solution adds them.

    A step from r to r' keeps g = decay(r')/decay(r) of the noise it finds and draws sqrt(1 - g²).
    """
    logs = np.array([log_decay(math.exp(-lam)) for lam in LAMBDAS])
    fine = np.sqrt(-np.expm1(2 * (logs[1:] - logs[:-1])))
    out = []
    for i in range(steps):
        part = slice(i * FINEST // steps, (i + 1) * FINEST // steps)
        weights = torch.from_numpy(np.exp(logs[part.stop] - logs[1:][part]) * fine[part])
        out.append((weights[:, None, None] * noises[part]).sum(0) / weights.square().sum().sqrt())
    return out


def along_path(
    name: str, steps: int, draws: int, log_decay: Callable[[float], float], **options: Any
) -> Tensor:
    """The sampler's end on ``steps`` even steps along the one path, drawing ``draws`` noises a step."""
    generator = torch.Generator().manual_seed(2)
    noises = torch.randn(FINEST, PATHS, 2, generator=generator, dtype=torch.float64)
    start = torch.randn(PATHS, 2, generator=generator, dtype=torch.float64) * 0.8
    sampler = samplers.create(name, final="sigma_min", **options)
    sigmas = np.exp(-LAMBDAS[:: FINEST // steps]).tolist()
    drawn = iter(aggregated(noises, steps * draws, log_decay))
    end = sampler.sample(MIXTURE.denoise(FLOW), start, FLOW, sigmas=sigmas, noise=drawn.__next__)
    assert next(drawn, None) is None
    return end


@cache
def sde_solution() -> Tensor:
    return along_path("dpmpp_2m_sde", FINEST, 1, math.log)


@pytest.mark.parametrize(
    ("name", "draws", "options"),
    [
        ("ddpm", 1, {}),
        ("ddpm", 1, {"variance": "fixed_large"}),
        ("ddim", 1, {"eta": 1.0}),
        ("euler_ancestral", 1, {}),
        ("dpm2_ancestral", 1, {}),
        ("dpmpp_2s_ancestral", 1, {}),
        ("dpmpp_sde", 2, {}),
        ("dpmpp_2m_sde", 1, {"kind": "heun"}),
        ("dpmpp_3m_sde", 1, {"curvature": "exact"}),
        ("dpm_solver_2m_sde", 1, {}),
        ("sa_solver", 1, {}),
        ("sa_solver", 1, {"expands": "noise"}),
        ("er_sde", 1, {"scale": "sde"}),
    ],
)
def test_all_solve_one_sde_along_one_path(name: str, draws: int, options: dict[str, Any]) -> None:
    """Additive noise: order 1 along the path (half of it at least over three halvings), towards one limit."""
    errors = [
        (along_path(name, n, draws, math.log, **options) - sde_solution()).square().mean().sqrt().item()
        for n in LEVELS
    ]
    slope = math.log2(errors[0] / errors[-1]) / 3
    assert slope > 0.75, errors
    assert errors[-1] < 0.02


@pytest.mark.parametrize(
    ("name", "options", "log_decay"),
    [
        ("sa_solver", {"tau": 0.6}, lambda r: 0.36 * math.log(r)),
        ("dpmpp_2m_sde", {"eta": 0.5}, lambda r: 0.5 * math.log(r)),
        ("er_sde", {"scale": "er5"}, lambda r: math.log(math.exp(r**0.3) + 10)),
        ("er_sde", {"scale": "er3", "points_used": 1}, lambda r: 1.5 * math.log(r)),
    ],
)
def test_other_amounts_of_noise_have_a_limit_too(
    name: str, options: dict[str, Any], log_decay: Callable[[float], float]
) -> None:
    limit = along_path(name, FINEST, 1, log_decay, **options)
    errors = [
        (along_path(name, n, 1, log_decay, **options) - limit).square().mean().sqrt().item() for n in LEVELS
    ]
    assert math.log2(errors[0] / errors[-1]) / 3 > 0.75, errors
    assert errors[-1] < 0.02


def test_two_amounts_of_noise_are_one_sde() -> None:
    """tau² of SA-Solver is eta of SDE-DPM-Solver++: the same limit along the same path."""
    law = lambda r: 0.36 * math.log(r)  # noqa: E731 (an argument with a name)
    a = along_path("sa_solver", 256, 1, law, tau=0.6)
    b = along_path("dpmpp_2m_sde", 256, 1, law, eta=0.36)
    # Both have 256 steps' error of about 1e-3; without noise in common they would differ by the data's spread.
    assert (a - b).abs().max() < 0.01

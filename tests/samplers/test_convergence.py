"""Every sampler's order, measured: the slope of its error against network evaluations, in float64.

The problem is a mixture of four Gaussians in the plane, whose ideal network is a formula and whose probability-flow
ODE an 8th-order integrator solves to 1e-12. The interval (flow times 0.7 to 0.1, ``final="sigma_min"``) has no end
that a method treats specially. Fitted are 60 to 156 evaluations: below, higher terms of the error still tilt the
slope of many methods. Where two terms of the error cross within that range on this interval, another one is used
(``Row.interval``). Numbers of evaluations are multiples of 6, so that groups of two and of three stages are whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.denoisers import analytic
from imagen_kit.samplers.base import Sampler
from imagen_kit.schedules.base import Schedule

DATA = analytic.problem("gmm2d")
FLOW, SD = schedules.create("flow"), schedules.create("scaled_linear")


@dataclass(frozen=True)
class Row:
    """What a sampler is expected to show.

    Attributes:
        order: slope of the error on the short interval.
        options: of the sampler; noise off.
        graded: begin with short steps, growing linearly. A multistep method starts with formulas of lower
            order, and one Euler step of ordinary length would limit any run to second order.
        interval: flow times of the short interval.
        declared: what the sampler says, where it is not what is measured; with the reason beside it.
        in_use: least slope past 80 evaluations on the schedule and spacing people use, where the method is
            not yet near its limit there.
    """

    order: float
    options: dict[str, Any] = field(default_factory=dict)
    graded: bool = False
    interval: tuple[float, float] = (0.7, 0.1)
    declared: int | None = None
    in_use: float | None = None


NO_NOISE = {"eta": 0.0}
#: Where two terms of a method's error cross on the ordinary interval before they reach their limit.
OTHER = (0.7, 0.3)
ROWS: dict[str, list[Row]] = {
    "ddim": [Row(1)],
    "deis": [
        *(Row(n, {"order": n}, graded=True) for n in (1, 2, 3)),
        Row(4, {"order": 4}, graded=True, interval=OTHER, in_use=3.25),
        Row(3, {"variable": "rho"}, graded=True),
        Row(3, {"variable": "log_rho"}, graded=True),
    ],
    "dpm2": [Row(2)],
    "dpm2_ancestral": [Row(2, NO_NOISE)],
    "dpm_solver_1s": [Row(1)],
    "dpm_solver_2m": [Row(2, graded=True), Row(2, {"kind": "heun"}, graded=True)],
    "dpm_solver_2m_sde": [Row(2, NO_NOISE, graded=True)],
    "dpm_solver_2s": [Row(2), Row(2, {"kind": "heun"})],
    "dpm_solver_3m": [Row(2, graded=True), Row(3, {"curvature": "exact"}, graded=True)],
    "dpm_solver_3s": [Row(3), Row(3, {"kind": "heun"})],
    "dpmpp_2m": [Row(2, graded=True), Row(2, {"kind": "heun"}, graded=True)],
    "dpmpp_2m_sde": [Row(2, NO_NOISE, graded=True)],
    "dpmpp_2s": [Row(2), Row(2, {"kind": "heun"})],
    "dpmpp_2s_ancestral": [Row(2, NO_NOISE)],
    "dpmpp_3m": [Row(2, graded=True), Row(3, {"curvature": "exact"}, graded=True)],
    "dpmpp_3m_sde": [Row(2, NO_NOISE, graded=True), Row(3, {**NO_NOISE, "curvature": "exact"}, graded=True)],
    "dpmpp_3s": [Row(3, in_use=2.5), Row(3, {"kind": "heun"}, in_use=2.5)],
    "dpmpp_sde": [Row(2, NO_NOISE), Row(2, {**NO_NOISE, "r": 0.3})],
    "edm": [Row(2, {"s_churn": 0.0}), Row(1, {"s_churn": 0.0, "solver": "euler"})],
    "er_sde": [
        Row(1, {"scale": "ode", "points_used": 1}),
        Row(2, {"scale": "ode", "points_used": 2}, graded=True),
        Row(2, {"scale": "ode"}, graded=True),
        Row(3, {"scale": "ode", "curvature": "exact"}, graded=True),
    ],
    "euler": [Row(1)],
    "euler_ancestral": [Row(1, NO_NOISE)],
    "flow_euler": [Row(1)],
    "flow_heun": [Row(2)],
    "heun": [Row(2)],
    "ipndm": [
        *(Row(n, {"order": n, "variable_step": True}, graded=True) for n in (1, 2, 3, 4)),
        # weights for equal steps in sigma / alpha, on a grid of other steps
        Row(2, {"order": 4}, declared=4),
    ],
    "lms": [Row(n, {"order": n}, graded=True) for n in (1, 2, 3, 4)],
    # fourth-order weights in time, but a step's noise counts by its change of sigma / alpha
    "plms": [Row(2), Row(2, {"skip_prk_steps": False}, interval=(0.6, 0.2))],
    "res_multistep": [Row(n, {"order": n}, graded=True) for n in (1, 2, 3)],
    "restart": [Row(2, {"intervals": ()}), Row(1, {"intervals": (), "solver": "euler"})],
    "sa_solver": [
        Row(2, {"tau": 0.0}, graded=True),
        Row(3, {"tau": 0.0, "predictor_order": 3, "corrector_order": 0}, graded=True),
        Row(4, {"tau": 0.0, "predictor_order": 4, "corrector_order": 0}, graded=True, in_use=3.5),
        Row(3, {"tau": 0.0, "predictor_order": 2, "corrector_order": 3}, graded=True),
        # its error on the whole range changes sign near 200 evaluations
        Row(2, {"tau": 0.0, "expands": "noise"}, graded=True, in_use=1.0),
    ],
    "unipc": [
        # the option is the predictor's order, and the corrector adds one (Zhao et al. 2023, Theorem 3.1)
        *(
            Row(
                n + 1,
                {"order": n, "variant": variant},
                graded=True,
                interval=OTHER if n == 3 else (0.7, 0.1),
                declared=n,
                in_use=3.0 if n == 3 else None,
            )
            for variant in ("bh1", "bh2")
            for n in (1, 2, 3, 4)
        ),
        Row(3, {"predict": "noise"}, graded=True, declared=2),
        Row(2, {"disable_corrector": tuple(range(160))}, graded=True),
        Row(3, {"predictor": "lms"}, graded=True, interval=OTHER, declared=2, in_use=2.5),
    ],
}
#: Samplers without a form that is deterministic and of some order; moment tests judge them.
NOISY = {"ddpm", "lcm", "tcd"}
#: Samplers that choose their steps by the error.
ADAPTIVE = {"dpm_adaptive"}

CASES = [
    pytest.param(name, row, id=f"{name}-{i}") for name, rows in ROWS.items() for i, row in enumerate(rows)
]


def build(name: str, row: Row, **options: Any) -> Sampler:
    """The sampler of a row, ending at sigma_min, with nothing lowered there."""
    fields = {f.name for f in dataclasses.fields(samplers.registry.get(name))}
    lowered = {"lower_order_final": False} if "lower_order_final" in fields else {}
    return samplers.create(name, final="sigma_min", **lowered, **row.options, **options)


@cache
def exact(schedule: Schedule, high: float, low: float) -> tuple[Tensor, Tensor]:
    """32 states at time ``high`` and the exact solution from them at ``low``."""
    generator = torch.Generator().manual_seed(1)
    alpha, sigma = schedule.alpha_sigma(high)
    x = alpha * DATA.sample(32, generator)
    x = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, analytic.solve_ode(DATA, x, schedule, high, low)


def grid(interval: tuple[float, float], steps: int, graded: bool) -> list[float]:
    """Flow times over the interval, evenly in log-SNR or with steps there that grow linearly."""
    place = np.linspace(0, 1, steps + 1) ** (2 if graded else 1)
    high, low = (FLOW.log_snr(t) for t in interval)
    inner = FLOW.t_of_log_snr(torch.from_numpy(high + (low - high) * place[1:-1])).tolist()
    return [interval[0], *inner, interval[1]]


def error(sampler: Sampler, schedule: Schedule, times: list[float]) -> tuple[int, float]:
    """(evaluations, root mean square distance from the exact solution) on a grid."""
    x, want = exact(schedule, times[0], times[-1])
    got = sampler.sample(DATA.denoise(schedule), x, schedule, timesteps=times)
    return sampler.tableau(schedule, timesteps=times).nfe, (got - want).square().mean().sqrt().item()


def slope(measured: list[tuple[int, float]]) -> float:
    """Exponent p of error ~ evaluations^-p by least squares on logarithms."""
    evaluations, errors = np.log(measured).T
    return -float(np.polyfit(evaluations, errors, 1)[0])


def stages(sampler: Sampler) -> int:
    """Evaluations a step, but for a few at the start."""
    times = grid((0.7, 0.1), 60, False)
    return round(sampler.tableau(FLOW, timesteps=times).nfe / 60)


def test_every_sampler_has_a_row() -> None:
    assert set(samplers.names()) == set(ROWS) | NOISY | ADAPTIVE
    for name in NOISY:
        assert samplers.describe(name)["stochastic"]
    for name in ADAPTIVE:
        assert not samplers.describe(name)["linear"]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_order(name: str, row: Row) -> None:
    sampler = build(name, row)
    steps = [budget // stages(sampler) for budget in (60, 96, 156)]
    measured = [error(sampler, FLOW, grid(row.interval, n, row.graded)) for n in steps]
    assert (
        measured[-1][1] > 1e-10
    )  # far above rounding and the reference's own error, so that there is a slope
    assert slope(measured) == pytest.approx(row.order, abs=0.25)
    assert sampler.order == (row.order if row.declared is None else row.declared)


@pytest.mark.parametrize(("name", "row"), CASES)
def test_no_order_is_lost_past_80_evaluations(name: str, row: Row) -> None:
    """On Stable Diffusion's schedule with Karras spacing, all 1000 times of it, as people run them.

    Peers fall to no order at all there, where times are rounded to integers or tables are float32. Methods
    may do better than their order on this interval: what a first Euler step spoils at pure noise, or far from
    the limit, shows little.
    """
    sampler = build(name, row, spacing="karras")
    grids = [sampler.tableau(SD, budget // stages(sampler)).times for budget in (78, 156)]
    measured = [error(sampler, SD, list(times)) for times in grids]
    assert slope(measured) > (row.in_use or row.order) - 0.25


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_keep_the_order(order: int) -> None:
    """Tolerances a hundred times smaller: the error falls with the order of the step in the evaluations."""
    high, low = ROWS["heun"][0].interval
    x, want = exact(FLOW, high, low)
    measured = []
    for tolerance in (1e-3, 1e-5) if order == 2 else (1e-4, 1e-6):
        sampler = samplers.create(
            "dpm_adaptive", order=order, rtol=tolerance, atol=tolerance, final="sigma_min"
        )
        count, denoise = [], DATA.denoise(FLOW)
        got = sampler.sample(
            lambda x, t, count=count, denoise=denoise: count.append(1) or denoise(x, t),
            x,
            FLOW,
            timesteps=[high, low],
        )
        measured.append((len(count), (got - want).square().mean().sqrt().item()))
    assert slope(measured) > order - 0.25

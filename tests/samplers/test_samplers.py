"""What holds for every sampler: one row a sampler, judged against exact problems and identities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sampler_oracles import EagerRun, gaussian_denoiser, group, mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.base import Sampler

#: One row a sampler: evaluations of a run of 12 steps to the clean end, and the global order of its
#: deterministic part with the options that show it (no lowering at the end). A new sampler needs a row here.
ROWS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "ddpm": (12, 1, {}),
    "deis": (12, 3, {}),
    "dpm2": (23, 2, {}),
    "dpm2_ancestral": (23, 2, {"eta": 0.0}),
    "dpm_solver_1s": (12, 1, {}),
    "dpm_solver_2m": (12, 2, {}),
    "dpm_solver_2m_sde": (12, 2, {"eta": 0.0}),
    "dpm_solver_3m": (12, 2, {}),
    "dpmpp_2s_ancestral": (23, 2, {"eta": 0.0}),
    "flow_euler": (12, 1, {}),
    "flow_heun": (23, 2, {}),
    "ipndm": (12, 4, {}),
    "lms": (12, 4, {}),
    "plms": (13, 2, {}),
    "res_multistep": (12, 2, {}),
    "unipc": (12, 2, {}),
    "ddim": (12, 1, {}),
    "euler": (12, 1, {}),
    "euler_ancestral": (12, 1, {"eta": 0.0}),
    "heun": (23, 2, {}),
    "dpm_solver_2s": (12, 2, {}),
    "dpm_solver_3s": (12, 3, {"lower_order_final": False}),
    "dpmpp_2s": (12, 2, {}),
    "dpmpp_3s": (12, 3, {"lower_order_final": False}),
    "dpmpp_2m": (12, 2, {}),
    "dpmpp_3m": (12, 2, {}),
    "dpmpp_2m_sde": (12, 2, {"eta": 0.0}),
    "dpmpp_3m_sde": (12, 2, {"eta": 0.0}),
    "dpmpp_sde": (23, 2, {"eta": 0.0}),
    "edm": (23, 2, {"s_churn": 0.0}),
    "er_sde": (12, 2, {"scale": "ode"}),
    "lcm": (12, 1, {}),
    "restart": (41, 2, {"intervals": ()}),
    "sa_solver": (12, 2, {"tau": 0.0}),
    "tcd": (12, 1, {"gamma": 0.0}),
}
SAMPLERS = sorted(ROWS)
DETERMINISTIC = [name for name in SAMPLERS if not samplers.registry.get(name).stochastic]
#: Samplers that have a form without noise, with the options for it in their row.
NOISELESS = [name for name in SAMPLERS if name not in ("ddpm", "lcm")]
#: Those that sample with a consistency function in place of x0 are in test_moments.
STOCHASTIC = [
    name for name in SAMPLERS if samplers.registry.get(name).stochastic and name not in ("lcm", "tcd")
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {},
    "cosine": {},
    "sigmoid": {},
    "edm": {},
    "flow": {},
    "flow-shifted": {"shift": 3.0},
    "cosine-discrete": {"timesteps": 1000},
}
#: Samplers that divide by alpha at the start, and so do not fit a start without signal.
NEED_SIGNAL = {
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver_1s",
    "dpm_solver_2m",
    "dpm_solver_2m_sde",
    "dpm_solver_2s",
    "dpm_solver_3m",
    "dpm_solver_3s",
    "dpmpp_2s_ancestral",
    "heun",
    "ipndm",
    "lms",
    "edm",
    "restart",
}


def make_schedule(name: str) -> Any:
    return schedules.create(name.partition("-")[0], **SCHEDULES[name])


def noise_like(schedule: Any, sampler: Sampler, steps: int, shape: tuple[int, ...] = (6, 2)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = sampler.tableau(schedule, steps).prior_std
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def test_every_sampler_has_a_row() -> None:
    """Samplers that are not linear, and so have no tableau, have tests of their own."""
    assert [name for name in samplers.names() if samplers.describe(name)["linear"]] == SAMPLERS


@pytest.mark.parametrize("name", SAMPLERS)
def test_facts(name: str) -> None:
    sampler = samplers.create(name)
    assert sampler.name == name
    assert sampler.nfe(12) == ROWS[name][0]
    assert sampler.nfe(sampler.steps_for(12)) <= 12
    assert sampler.tableau(schedules.create("flow"), 12).order == sampler.order == ROWS[name][1]
    assert bool(sampler.tableau(schedules.create("flow"), 12).noises) == sampler.stochastic
    facts = samplers.describe(name)
    assert facts["stochastic"] in (sampler.stochastic, "eta > 0", "with stochastic_sampling")
    assert facts["summary"]


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_answer(name: str, schedule_name: str) -> None:
    """One step to the clean end is x0 by the network at the noisy end."""
    # LCM mixes in some of x, by its distance from the clean end in training steps.
    options = {"timestep_scaling": 1e9} if name == "lcm" else {}
    schedule, sampler = make_schedule(schedule_name), samplers.create(name, **options)
    x = noise_like(schedule, sampler, 1)
    denoise = mixture_denoiser(schedule)
    expected = denoise(x, sampler.tableau(schedule, 1).times[0])
    # The weights of x and of the noise cancel to rounding of sigma (80 at most).
    torch.testing.assert_close(sampler.sample(denoise, x, schedule, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", NOISELESS)
def test_point_data_is_exact(name: str, schedule_name: str, final: str) -> None:
    """Data at one point: x0 never changes, and every method without noise keeps x on alpha c + sigma e."""
    options = {key: value for key, value in ROWS[name][2].items() if key != "lower_order_final"}
    schedule, sampler = make_schedule(schedule_name), samplers.create(name, final=final, **options)
    tableau = sampler.tableau(schedule, 9)
    point, e = torch.full((1, 2), 0.7, dtype=torch.float64), torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    start = tableau.start[0] * point + tableau.start[1] * e
    end = sampler.sample(lambda x, t: point, start, schedule, 9)
    # Weights of up to 1e4 (Heun from sigma/alpha = 2e4 on the discrete cosine schedule) cancel in float64.
    torch.testing.assert_close(end, tableau.end[0] * point + tableau.end[1] * e, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_twenty_evaluations_on_a_flow_model(name: str) -> None:
    """With default options 20 evaluations come close to the exact solution from pure noise."""
    schedule, sampler = schedules.create("flow"), samplers.create(name)
    tensors = group("ode_reference")[1]
    steps = sampler.steps_for(20)
    assert sampler.nfe(steps) <= 20
    x = tensors["x_T"] * sampler.tableau(schedule, steps).prior_std
    got = sampler.sample(mixture_denoiser(schedule), x, schedule, steps)
    error = (got - tensors["flow.x"][-1]).pow(2).mean().sqrt().item()
    # The data's standard deviation is about 1; first order measures 0.05, Heun 0.12, the others below.
    assert error < 0.16


def moments(sampler: Sampler, schedule: Any, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler makes of Gaussian data, exactly and without sampling.

    The network is affine then, so the sample is too, in the start and in every noise: one row of the batch
    has none of them, each of the others has a single one at 1, and the squares of the responses add up.
    """
    tableau = sampler.tableau(schedule, steps)
    x = torch.zeros(2 + tableau.noises, 1, dtype=torch.float64)
    x[1] = tableau.prior_std
    one_hot = iter(torch.eye(len(x), dtype=torch.float64)[2:, :, None])
    out = sampler.sample(gaussian_denoiser(schedule, mean, std), x, schedule, steps, noise=one_hot.__next__)
    return out[0].item(), (out[1:] - out[0]).pow(2).sum().sqrt().item()


@pytest.mark.parametrize("schedule_name", ["flow", "edm", "linear"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_distribution(name: str, schedule_name: str) -> None:
    """On Gaussian data the sampled mean and spread approach the data's with (weak) order one at least."""
    schedule, sampler = make_schedule(schedule_name), samplers.create(name)
    mean, std = 0.4, 0.5
    few, many = (moments(sampler, schedule, steps, mean, std) for steps in (50, 400))
    # First-order samplers shrink the spread: by a tenth at 50 steps here, by an eighth of that at 400.
    assert few == pytest.approx((mean, std), abs=0.075)
    assert many == pytest.approx((mean, std), abs=0.012)


@pytest.mark.parametrize("name", SAMPLERS)
def test_tableau_equals_the_eager_formula(name: str) -> None:
    schedule, sampler = schedules.create("cosine"), samplers.create(name)
    x = noise_like(schedule, sampler, 12)
    noises = torch.randn(30, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eager = EagerRun(
        schedule, sampler.points(schedule, 12), mixture_denoiser(schedule), iter(noises).__next__
    )
    sampler.solve(x, eager)  # type: ignore[arg-type]
    states: list[torch.Tensor] = []
    sampler.sample(
        mixture_denoiser(schedule),
        x,
        schedule,
        12,
        noise=iter(noises).__next__,
        callback=lambda step, state, x0: states.append(state),
    )
    # Rounding, amplified by Heun's weights of up to 1e3 from sigma/alpha = 250.
    torch.testing.assert_close(torch.stack(states), torch.stack(eager.states), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    schedule, sampler = schedules.create("flow"), samplers.create(name)
    x = noise_like(schedule, sampler, 5)
    denoise = mixture_denoiser(schedule)

    def run(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sampler.sample(denoise, x[rows], schedule, 5, generator=generators)

    together = run([0, 1, 2, 3, 4, 5])
    apart = torch.cat([run([0, 1]), run([2]), run([3, 4, 5])])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)  # softmax sums may order differently


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    """float32 differs from float64 by rounding; bfloat16 by its 8 bits, from sums that are still float32."""
    schedule, sampler = schedules.create("flow"), samplers.create(name)
    x = noise_like(schedule, sampler, 8)
    noises = torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = sampler.sample(gaussian_denoiser(schedule, 0.2, 0.5), x, schedule, 8, noise=iter(noises).__next__)
    seen = set()

    def denoise(state: torch.Tensor, t: float) -> torch.Tensor:
        seen.add((state.dtype, type(t)))
        return gaussian_denoiser(schedule, 0.2, 0.5)(state, t)

    coarse = iter(noises.to(dtype)).__next__
    got = sampler.sample(denoise, x.to(dtype), schedule, 8, noise=coarse)
    assert got.dtype == dtype
    assert seen == {(dtype, float)}
    # The network's answers are rounded once each; the largest weight says how much of that a state can hold,
    # the largest result how far it grows (the noise-predicting SDE's first steps here are far too long for it).
    largest = max(abs(weight) for row in sampler.tableau(schedule, 8).rows for _, weight in row.weights)
    largest *= max(1.0, exact.abs().max().item())
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=8 * largest * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_immutable(name: str) -> None:
    sampler = samplers.create(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.spacing = "karras"
    schedule = schedules.create("flow")
    assert sampler.tableau(schedule, 7).rows == sampler.tableau(schedule, 7).rows


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_start_without_signal(name: str) -> None:
    """Zero terminal SNR: samplers that need no alpha run, the others say that they do not fit."""
    schedule = schedules.create("scaled_linear", zero_terminal_snr=True)
    sampler = samplers.create(name)
    if name in NEED_SIGNAL:
        with pytest.raises(KitError, match=rf"'{name}' does not fit schedule 'scaled_linear' .*alpha = 0"):
            sampler.tableau(schedule, 10)
        return
    x = noise_like(schedule, sampler, 10)
    assert sampler.sample(mixture_denoiser(schedule), x, schedule, 10).isfinite().all()


def test_methods_that_are_the_same() -> None:
    """DDIM = Euler; DDIM with eta = 1 = DDPM = Euler ancestral; SDE-2M without noise = 2M."""
    schedule = schedules.create("cosine")
    x = noise_like(schedule, samplers.create("ddim"), 9)
    noises = torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(name: str, **options: Any) -> torch.Tensor:
        sampler = samplers.create(name, spacing="trailing", **options)
        return sampler.sample(mixture_denoiser(schedule), x, schedule, 9, noise=iter(noises).__next__)

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=0, atol=1e-12)

    assert same(run("ddim"), run("euler"))
    assert same(run("ddim", eta=1.0), run("ddpm"))
    assert same(run("ddim", eta=1.0), run("euler_ancestral"))
    assert same(run("ddim", eta=0.3), run("euler_ancestral", eta=0.3))
    assert same(run("dpmpp_2m_sde", eta=0.0), run("dpmpp_2m"))
    assert same(run("ddpm", variance=0.0), run("ddpm", variance="fixed_small"))
    assert same(run("ddpm", variance=1.0), run("ddpm", variance="fixed_large"))
    assert not same(run("ddpm", variance=1.0), run("ddpm"))
    assert not same(run("dpmpp_2m", kind="heun"), run("dpmpp_2m"))

"""Other projects' names for our samplers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.recipe import check
from imagen_kit.samplers.aliases import ALIASES, from_diffusers

#: DESIGN's list: what an alias may stand for, and what ``names`` must hold.
DESIGN = (
    *("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "lms", "plms", "ipndm"),
    *("deis", "dpm_solver_1s", "dpm_solver_2s", "dpm_solver_3s", "dpm_solver_2m", "dpmpp_2s", "dpmpp_3s"),
    *("dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "sa_solver", "er_sde"),
    *("edm", "restart", "lcm", "tcd", "flow_euler", "flow_heun", "dpm_adaptive"),
)


def test_all_of_the_design_are_there_and_no_alias_is_listed() -> None:
    assert set(DESIGN) <= set(samplers.names())
    assert not set(ALIASES) & set(samplers.names())


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_is_a_sampler_with_its_options(alias: str) -> None:
    name, options = ALIASES[alias]
    made = samplers.create(alias)
    assert made == samplers.create(name, **options)
    assert made == samplers.create(alias.upper())
    assert made.name == name
    if samplers.describe(name)["linear"]:
        assert made.tableau(schedules.create("scaled_linear"), 4).nfe >= 4


def test_names_everybody_knows() -> None:
    def made(alias: str) -> tuple[str, dict[str, Any]]:
        sampler = samplers.create(alias)
        default = samplers.create(sampler.name)
        keys = inspect.signature(type(sampler)).parameters
        changed = {
            key: getattr(sampler, key) for key in keys if getattr(sampler, key) != getattr(default, key)
        }
        return sampler.name, changed

    full = {"lower_order_final": False}
    assert made("DPM++ 2M Karras") == ("dpmpp_2m", {"spacing": "karras", **full})
    assert made("DPM++ 2M SDE Heun Exponential") == (
        "dpmpp_2m_sde",
        {"spacing": "exponential", "kind": "heun", **full},
    )
    assert made("Euler a") == ("euler_ancestral", {"spacing": "linspace"})
    assert made("sample_dpmpp_3m_sde") == ("dpmpp_3m_sde", full)
    assert made("dpmpp_2m_sde_gpu") == ("dpmpp_2m_sde", full)
    assert made("uni_pc") == ("unipc", {"variant": "bh1", "order": 3})
    assert made("euler_cfg_pp") == ("euler", {"renoise": "uncond"})
    assert made("DDIM") == ("ddim", {"spacing": "leading", "offset": 1})
    assert made("DEISMultistepScheduler")[1]["variable"] == "log_rho"
    assert made("KDPM2AncestralDiscreteScheduler") == ("dpm2_ancestral", {"spacing": "linspace"})


def test_explicit_options_go_first() -> None:
    made = samplers.create("DPM++ 2M Karras", spacing="beta", kind="heun")
    assert (made.spacing, made.kind, made.lower_order_final) == ("beta", "heun", False)
    with pytest.raises(KitError, match="sampler 'Euler a' has no option 'etaa'; did you mean 'eta'"):
        samplers.create("Euler a", etaa=1.0)


def test_an_alias_is_described_by_what_it_stands_for() -> None:
    facts = samplers.describe("DPM++ 2M Karras")
    assert facts["name"] == "dpmpp_2m"
    assert facts["options"]["spacing"] == "karras"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("DPM++ 2M Karas", "DPM++ 2M Karras"),
        ("dpmp_2m", "dpmpp_2m"),
        ("EulerDiscreteSheduler", "EulerDiscreteScheduler"),
        ("sample_dpmpp_2m_sd", "sample_dpmpp_2m_sde"),
    ],
)
def test_unknown_names_give_the_nearest(name: str, near: str) -> None:
    with pytest.raises(KitError) as caught:
        samplers.create(name)
    assert str(caught.value) == f"unknown sampler {name!r}; did you mean {near!r}?"


def test_something_else_entirely_lists_ours() -> None:
    with pytest.raises(KitError, match=r"unknown sampler 'qqqqqqqqq'; choose from ddim, ddpm, deis"):
        samplers.create("qqqqqqqqq")


def test_recipes_take_aliases() -> None:
    part = {"name": "DPM++ 2M Karras", "steps": 8, "kind": "heun"}
    assert list(check.option_faults(samplers.registry, part, "stages.0.sampler")) == []
    part["kinds"] = "heun"
    (fault,) = check.option_faults(samplers.registry, part, "stages.0.sampler")
    assert "did you mean 'kind'" in str(fault)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_dpm_solvers_by_config(scheduler: str, kind: str, order: int) -> None:
    config = {"solver_order": order, "algorithm_type": kind, "use_karras_sigmas": True, "solver_type": "heun"}
    if kind == "sde-dpmsolver" and not (order == 2 and "Multi" in scheduler):
        with pytest.raises(
            KitError, match=f"no sampler here is {scheduler} with algorithm_type='sde-dpmsolver'"
        ):
            from_diffusers(scheduler, config)
        return
    name, options = from_diffusers(scheduler, config)
    made = samplers.create(name, **options)
    assert made.spacing == "karras"
    assert made.order <= order  # the published third-order multistep is second order in the limit
    assert bool(made.tableau(schedules.create("scaled_linear"), 6).noises) == kind.startswith("sde")


def test_other_configs() -> None:
    assert from_diffusers("DDIMScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}) == (
        "ddim",
        {"spacing": "trailing", "offset": 1},
    )
    assert (
        from_diffusers("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"})[1]["final"]
        == "sigma_min"
    )
    name, options = from_diffusers("UniPCMultistepScheduler", {"predict_x0": False, "disable_corrector": [0]})
    assert samplers.create(name, **options).predict == "noise"
    assert from_diffusers("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})[1][
        "stochastic_sampling"
    ]
    with pytest.raises(
        KitError, match="unknown diffusers scheduler 'DDIMSheduler'; did you mean 'DDIMScheduler'"
    ):
        from_diffusers("DDIMSheduler")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
        ("UniPCMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    ],
)
def test_an_alias_samples_as_the_scheduler_does(scheduler: str, config: dict[str, Any]) -> None:
    """Name, options and grid together, at ten steps, against the schedulers of diffusers themselves."""
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = getattr(diffusers, scheduler)(prediction_type="sample", **betas, **config)
    theirs.set_timesteps(10)
    x = start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * theirs.init_noise_sigma
    schedule = schedules.create("scaled_linear")
    for t in theirs.timesteps:
        at = theirs.scale_model_input(x, t)
        x = theirs.step(0.4 * at, t, x).prev_sample
    name, options = from_diffusers(scheduler, config)
    sampler = samplers.create(name, **options)
    alpha = schedule.alpha_sigma(schedule.t_max)[0] if theirs.init_noise_sigma > 1 else 1.0
    ours = sampler.sample(lambda x, t: 0.4 * x, start * alpha, schedule, 10)
    # float32 tables and states of the peer, and the whole times that its Karras grid rounds to
    torch.testing.assert_close(ours, x, rtol=2e-3, atol=2e-3)

"""diffusers' scheduler that takes the steps of one of our stages, found by what its class and config mean here."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from imagen_kit import samplers
from imagen_kit.bench.peers import library
from imagen_kit.errors import KitError
from imagen_kit.guidance.dynamic_threshold import DynamicThreshold
from imagen_kit.samplers.aliases import from_diffusers
from imagen_kit.stage import Stage

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_OFFSET = {"timestep_spacing": "leading", "steps_offset": 1}
#: Configs to look among: those of published pipelines, and the classes' defaults.
CANDIDATES: list[tuple[str, dict[str, Any]]] = [
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, **_OFFSET}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DDIMScheduler", {"set_alpha_to_one": False, **_OFFSET}),
    ("DDIMScheduler", {}),
    *((name, {**_OFFSET}) for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")),
    *(
        (name, {"timestep_spacing": spacing})
        for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
        for spacing in ("linspace", "trailing")
    ),
    *(
        ("DDPMScheduler", {"timestep_spacing": spacing, "variance_type": variance})
        for spacing in ("leading", "linspace")
        for variance in ("learned_range", "fixed_small", "fixed_large")
    ),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
]


def scheduler_for(stage: Stage, threshold: DynamicThreshold | None = None) -> Any:
    """A scheduler with the stage's grid, update and schedule.

    Args:
        stage: of ours.
        threshold: of x0, which there is the scheduler's.

    Raises:
        KitError: none that is known here takes these steps; diffusers is not installed.
    """
    diffusers = library("diffusers")
    if stage.prediction == "flow":
        return _flow(diffusers, stage)
    name, config = _found(stage.sampler)
    kind = getattr(diffusers, name)
    takes = inspect.signature(kind.__init__).parameters
    told = {**config, "trained_betas": _betas(stage.schedule), "prediction_type": _prediction(stage)}
    told["num_train_timesteps"] = len(told["trained_betas"])
    if "clip_sample" in takes:
        told["clip_sample"] = threshold is not None
    if threshold is not None:
        told |= {"thresholding": True, "dynamic_thresholding_ratio": threshold.percentile}
        told["sample_max_value"] = math.inf if threshold.cap is None else threshold.cap
    return kind(**told)


def _prediction(stage: Stage) -> str:
    if stage.prediction not in PREDICTIONS:
        raise KitError(f"diffusers' schedulers have no prediction {stage.prediction!r}")
    return PREDICTIONS[stage.prediction]


def _found(sampler: Any) -> tuple[str, dict[str, Any]]:
    """Class and config that stand for exactly this sampler."""
    for name, config in CANDIDATES:
        ours, options = from_diffusers(name, config)
        if samplers.create(ours, **options) == sampler:
            return name, config
    raise KitError(
        f"no scheduler of diffusers is known here that takes the steps of this {sampler.name}; "
        "give a sampler such as DDIMScheduler or DPMSolverMultistepScheduler"
    )


def _flow(diffusers: Any, stage: Stage) -> Any:
    """Of Stable Diffusion 3 (its own grid) and FLUX (a pipeline that gives the grid, and the log of the shift)."""
    shift = stage.schedule.shift
    if stage.sampler == samplers.create("flow_euler", spacing="sd3"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if stage.sampler == samplers.create("flow_euler"):
        moved = {"base_shift": math.log(shift), "max_shift": math.log(shift)}
        return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **moved)
    raise KitError("diffusers' pipelines of flow models are compared with the sampler flow_euler alone")


def _betas(schedule: Any) -> list[float]:
    """The betas of a discrete schedule; KitError for another."""
    if not getattr(schedule, "discrete", False):
        raise KitError(f"diffusers' schedulers are of discrete times, not of a schedule like {schedule.name}")
    times = torch.arange(round(schedule.t_max) + 1, dtype=torch.float64)
    kept = schedule.alpha_sigma(times)[0].square()
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return (1 - kept / before).tolist()

"""Others' samplers in the place of ours: diffusers' schedulers in the loop of its pipelines, k-diffusion's functions.

Axes: b batch, c h w pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_kit.bench.peers import library
from imagen_kit.errors import KitError
from imagen_kit.samplers.grid import Point

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
NOISE_END = {"final_sigmas_type": "sigma_min"}

#: Our name → diffusers' scheduler and what makes it that sampler. Samplers without one stand alone; edm is one of
#: them, since diffusers has it with Euler steps only.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "epsilon"}),
    "ipndm": ("IPNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"prediction_type": "epsilon"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {"prediction_type": "epsilon"}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {"prediction_type": "epsilon"}),
    "dpm_solver_2m": (MULTI, {"algorithm_type": "dpmsolver", **NOISE_END}),
    "dpm_solver_3m": (MULTI, {"algorithm_type": "dpmsolver", "solver_order": 3, **NOISE_END}),
    "dpm_solver_2m_sde": (MULTI, {"algorithm_type": "sde-dpmsolver", **NOISE_END}),
    "dpmpp_2m": (MULTI, {}),
    "dpmpp_3m": (MULTI, {"solver_order": 3}),
    "dpmpp_2m_sde": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": (MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm_solver_1s": (SINGLE, {"algorithm_type": "dpmsolver", "solver_order": 1, **NOISE_END}),
    "dpm_solver_2s": (SINGLE, {"algorithm_type": "dpmsolver", **NOISE_END}),
    "dpm_solver_3s": (SINGLE, {"algorithm_type": "dpmsolver", "solver_order": 3, **NOISE_END}),
    "dpmpp_2s": (SINGLE, {}),
    "dpmpp_3s": (SINGLE, {"solver_order": 3}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
#: Our name → k-diffusion's function, and whether it draws noise of its own.
FUNCTIONS: dict[str, tuple[str, bool]] = {
    "euler": ("sample_euler", False),
    "euler_ancestral": ("sample_euler_ancestral", True),
    "heun": ("sample_heun", False),
    "dpm2": ("sample_dpm_2", False),
    "dpm2_ancestral": ("sample_dpm_2_ancestral", True),
    "lms": ("sample_lms", False),
    "dpmpp_2m": ("sample_dpmpp_2m", False),
    "dpmpp_sde": ("sample_dpmpp_sde", True),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", True),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", True),
}
Answers = Callable[[], Callable[..., Tensor]]


class SchedulerLoop:
    """A diffusers scheduler in the loop of a pipeline, its network replaced.

    Args:
        name: of our sampler.
        steps: of a run.
        x: (b, c, h, w) where it starts.
        answers: () → what takes the network's place in one run.
        generator: of its noise, on x's device.

    Raises:
        KitError: diffusers is not installed, has no such scheduler, or cannot make it here (a package that it
            lacks, a prediction that it does not have).
    """

    def __init__(self, name: str, steps: int, x: Tensor, answers: Answers, generator: torch.Generator):
        if name not in SCHEDULERS:
            raise KitError(f"diffusers has no scheduler that is {name}")
        scheduler, config = SCHEDULERS[name]
        kind = getattr(library("diffusers"), scheduler)
        takes = inspect.signature(kind.__init__).parameters
        given = {**BETAS, "prediction_type": "sample", **config}
        try:
            self.scheduler = kind(**{key: value for key, value in given.items() if key in takes})
        except (ImportError, ValueError, NotImplementedError) as error:
            line = " ".join(str(error).split())[:200]
            raise KitError(f"diffusers' {scheduler} cannot be made here: {line}") from error
        self.steps, self.x, self.answers = steps, x, answers
        draws = "generator" in inspect.signature(kind.step).parameters
        self.extra = {"generator": generator} if draws else {}

    def prepare(self) -> None:
        """The grid of a run; a pipeline makes it anew for every run."""
        self.scheduler.set_timesteps(self.steps, device=self.x.device)

    def run(self) -> Tensor:
        """A run over the grid that was prepared, (b, c, h, w)."""
        x, answer, scheduler = self.x, self.answers(), self.scheduler
        scaled = hasattr(scheduler, "scale_model_input")
        for t in scheduler.timesteps:
            if scaled:
                scheduler.scale_model_input(x, t)
            x = scheduler.step(answer(), t, x, return_dict=False, **self.extra)[0]
        return x


class FunctionRun:
    """A function of ``k_diffusion.sampling`` over the grid of one of our samplers.

    Its state is ours over alpha: x0 + (sigma/alpha)·noise.

    Args:
        name: of our sampler.
        points: of our grid, the end included.
        x: (b, c, h, w) where ours starts.
        answers: () → what takes the network's place in one run.

    Raises:
        KitError: k_diffusion is not installed, or has no such function.
    """

    def __init__(self, name: str, points: Sequence[Point], x: Tensor, answers: Answers):
        if name not in FUNCTIONS:
            raise KitError(f"k_diffusion has no function that is {name}")
        function, self.draws = FUNCTIONS[name]
        self._function = getattr(library("k_diffusion.sampling", "k-diffusion"), function)
        ratios = [float(point.sigma) / float(point.alpha) for point in points]
        self.sigmas = torch.tensor(ratios, dtype=torch.float32, device=x.device)
        self.x, self.answers, self._end = x / float(points[0].alpha), answers, float(points[-1].alpha)

    def run(self) -> Tensor:
        """A run, its end as ours is, (b, c, h, w)."""
        out = self._function(self.answers(), self.x, self.sigmas, disable=True)
        return out if self._end == 1.0 else out * self._end

"""What ``benchmarks/samplers.py`` times: one sampler on one shape, run three ways, and what waits for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from imagen_kit import samplers, schedules
from imagen_kit.samplers.grid import Point

SMALL, LARGE = (1, 4, 8, 8), ((8, 3, 256, 256), (4, 16, 128, 128))
STEPS = {SMALL: 20, LARGE[0]: 10, LARGE[1]: 10}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

#: Our name → diffusers' scheduler and what makes it that sampler. Samplers without one stand alone; edm is one of
#: them, since diffusers has it with Euler steps only.
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
NOISE_END = {"final_sigmas_type": "sigma_min"}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
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


class EagerRun:
    """A formula's view of a run, computing on tensors step by step: what a tableau saves."""

    def __init__(self, schedule: Any, points: list[Point], denoise: Callable[..., Tensor], noise: Any):
        self.schedule, self.points, self.noise, self._denoise = schedule, points, noise, denoise

    @property
    def steps(self) -> Iterator[tuple[int, Point, Point]]:
        return ((i, now, then) for i, (now, then) in enumerate(itertools.pairwise(self.points)))

    def denoise(self, x: Tensor, at: Point) -> Tensor:
        return self._denoise(x, at.t)

    def step(self, x: Tensor) -> Tensor:
        return x

    keep = step

    def point(self, lam: float) -> Point:
        t = self.schedule.t_of_log_snr(2 * lam)
        return Point(t, *self.schedule.alpha_sigma(t))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for tensors that live on the device, or would on an accelerator.

    Args:
        on_device: the tensors to follow.
    """

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __init__(self, *on_device: Tensor):
        super().__init__()
        self.count = 0
        self._kept = list(on_device)  # alive, so that no other tensor takes their id
        self._ids = {id(tensor) for tensor in on_device}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        given = [item for item in tree_flatten((args, kwargs or {}))[0] if isinstance(item, Tensor)]
        followed = any(id(item) in self._ids or item.is_cuda for item in given)
        self.count += followed and name in self.READS
        self.count += name in ("copy_", "_to_copy") and len({item.device for item in given}) > 1
        out = func(*args, **(kwargs or {}))
        if followed:
            for item in tree_flatten(out)[0]:
                if isinstance(item, Tensor):
                    self._kept.append(item)
                    self._ids.add(id(item))
        return out


class Cell:
    """One sampler on one shape: what there is to time, as functions of no argument."""

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device):
        self.name, self.shape, self.device, self.steps = name, shape, device, STEPS[shape]
        self.schedule = schedules.create("scaled_linear")
        self.sampler = samplers.create(name)
        self.tableau = self.sampler.tableau(self.schedule, self.steps)
        self.points = self.sampler.points(self.schedule, self.steps)
        generator = torch.Generator().manual_seed(0)
        # More answers than fit into a cache, in turn, as a network would hand them over.
        count = 8 if shape != SMALL else 1
        self.pool = [torch.randn(shape, generator=generator).to(device) for _ in range(count)]
        self.generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(shape, generator=generator).to(device)

    def answers(self) -> Callable[..., Tensor]:
        pool = itertools.cycle(self.pool)
        return lambda *_: next(pool)

    def ours(self) -> Tensor:
        return self.sampler.sample(
            self.answers(), self.x, self.schedule, self.steps, generator=self.generator
        )

    def sums(self) -> Tensor:
        """The same with its noise given."""
        give = self.answers()
        return self.tableau.run(give, self.x, give)

    def eager(self) -> Tensor:
        """The formula on tensors, its coefficients computed step by step; the grid is there already."""
        noise = lambda: torch.randn(self.shape, generator=self.generator, device=self.device)  # noqa: E731
        return self.sampler.solve(self.x, EagerRun(self.schedule, self.points, self.answers(), noise))

    def bytes(self) -> int:
        """Read and written by the tableau's rows."""
        each = self.x.numel() * self.x.element_size()
        return each * sum(len(row.weights) + 1 for row in self.tableau.rows if row.computes)

    def copies(self) -> Callable[[], None]:
        """Plain copies, one a row, that read and write as many bytes together."""
        rows = sum(row.computes for row in self.tableau.rows)
        size = self.bytes() // (2 * self.x.element_size() * rows)
        count = max(1, 8 * self.x.numel() // size)
        sources = [torch.zeros(size, device=self.device) for _ in range(count)]
        targets = [torch.zeros(size, device=self.device) for _ in range(count)]

        def run() -> None:
            for i in range(rows):
                targets[i % count].copy_(sources[(i + 1) % count])

        return run


class Peer:
    """diffusers' scheduler in the place of one of our samplers, or the reason why there is none."""

    def __init__(self, cell: Cell):
        import diffusers

        self.cell = cell
        scheduler, config = PEERS[cell.name]
        kind = getattr(diffusers, scheduler)
        takes = (
            kind.__init__.__wrapped__.__code__.co_varnames if hasattr(kind.__init__, "__wrapped__") else ()
        )
        given = {**BETAS, "prediction_type": "sample", **config}
        self.scheduler = kind(**{key: value for key, value in given.items() if not takes or key in takes})
        self.draws = "generator" in kind.step.__code__.co_varnames

    def prepare(self) -> None:
        self.scheduler.set_timesteps(self.cell.steps, device=self.cell.device)

    def run(self) -> Tensor:
        """The loop of a pipeline, without its network."""
        x, answer, scheduler = self.cell.x, self.cell.answers(), self.scheduler
        extra = {"generator": self.cell.generator} if self.draws else {}
        scaled = hasattr(scheduler, "scale_model_input")
        for t in scheduler.timesteps:
            if scaled:
                scheduler.scale_model_input(x, t)
            x = scheduler.step(answer(), t, x, return_dict=False, **extra)[0]
        return x

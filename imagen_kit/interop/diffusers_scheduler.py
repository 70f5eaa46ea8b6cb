"""A sampler's tableau, one row a call, behind the surface of a diffusers scheduler.

Pipelines own the loop: they ask for ``timesteps``, evaluate the network at each, and hand the answer to ``step``.
Here a call ends where the tableau next wants the network: what lies between two evaluations is one ``step``.
Axes: b batch, n network calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from imagen_kit import prediction as predictions
from imagen_kit import samplers
from imagen_kit.denoise import denoise_fn
from imagen_kit.errors import KitError
from imagen_kit.interop.diffusers import PREDICTIONS, Trained, config_of, read, shifted
from imagen_kit.interop.stepping import Calls, Run
from imagen_kit.samplers.base import Generators, Sampler
from imagen_kit.schedules.base import Schedule

#: What Stable Diffusion 1 and 2, and SDXL, were trained on.
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}


def build(
    sampler: Any, like: Any, schedule: Schedule | None, prediction: str | None, options: dict[str, Any]
) -> KitScheduler:
    """See ``interop.diffusers.scheduler``."""
    if not isinstance(sampler, Sampler):
        sampler = samplers.create(sampler, **options)
    elif options:
        sampler = replace(sampler, **options)
    config = STABLE_DIFFUSION if like is None else config_of(like)
    trained = read(config)
    if schedule is not None:
        trained = replace(trained, schedule=schedule)
    if prediction is not None:
        trained = replace(trained, prediction=predictions.check(prediction), sign=1)
    return KitScheduler(sampler, trained, config)


@dataclass
class KitSchedulerOutput(BaseOutput):
    """What ``step`` returns.

    Attributes:
        prev_sample: (b, ...) the state the network is to see next, or the sample.
        pred_original_sample: (b, ...) x0 as predicted by this call.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class KitScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler for diffusers pipelines that runs one of our samplers; see ``interop.diffusers.scheduler``.

    The pipeline's loop makes it stateful, which our samplers are not: it keeps the tableau's slots between
    calls, from ``set_timesteps`` to the last ``step``.
    """

    def __init__(self, sampler: Sampler, trained: Trained, config: dict[str, Any]):
        self.sampler, self.trained = sampler, trained
        told = {key: value for key, value in config.items() if not key.startswith("_")}
        said = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        told |= {"num_train_timesteps": trained.steps, "sampler": sampler.name}
        told["like"] = config.get("like", config.get("_class_name"))  # a saved config still tells the kind
        told["prediction_type"] = said.get(trained.prediction, "epsilon")
        if trained.schedule.name == "flow":
            told["use_flow_sigmas"] = (
                True  # "make the grid yourself": pipelines then pass the number of steps
            )
        self.register_to_config(**told)
        self.num_inference_steps: int | None = None
        self._schedule = trained.schedule
        self._calls: Calls | None = None
        self._begin: int | None = None
        self._run: Run | None = None
        limits = [sampler.points(trained.schedule)[0].t]
        self.timesteps = self._told(limits, None)
        self.sigmas = self._ratios(limits)
        self.order = Calls.of(sampler.tableau(trained.schedule)).order

    # ---- the grid ------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            num_inference_steps: sampling steps; a step may be several calls (``order``).
            device: where ``timesteps`` goes.
            timesteps: explicit grid, in the numbers the network is told.
            sigmas: explicit grid: sigma / alpha, or on flow schedules the unshifted sigma, which is shifted
                here as diffusers does.
            mu: log of a flow schedule's shift, for models whose shift depends on the resolution.

        Raises:
            KitError: a grid that cannot be, or a sampler that the pipeline's loop cannot run.
        """
        self._schedule = self._shifted(mu)
        grid: dict[str, Any] = {}
        if timesteps is not None:
            given = self.trained.native(torch.as_tensor(timesteps, dtype=torch.float64).cpu())
            grid = {"timesteps": given.tolist()}
        if sigmas is not None:
            given = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
            if self._schedule.name == "flow":
                moved = [self._schedule.shift_time(sigma) for sigma in given.tolist()]
                grid["timesteps" if timesteps is None else "sigmas"] = [t for t in moved if t > 0]
            else:
                grid["sigmas"] = given.tolist()
        steps = None if grid else num_inference_steps
        self._calls = Calls.of(self.sampler.tableau(self._schedule, steps, **grid))
        tableau = self._calls.tableau
        self.num_inference_steps = len(tableau.times) - 1
        self.order = self._calls.order
        self.timesteps = self._told(self._calls.times, device)
        end = 0.0 if tableau.end[1] == 0 else tableau.end[1] / (1 if self._is_flow else tableau.end[0])
        self.sigmas = torch.cat([self._ratios(self._calls.times), torch.tensor([end])])
        self._begin = self._run = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The call to begin with, when a pipeline starts from a picture: an index into ``timesteps``."""
        self._begin = begin_index

    @property
    def begin_index(self) -> int | None:
        """The call the run begins with, where it has been set."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The call that is next, or None before the first."""
        return None if self._run is None else self._run.call

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise to start from."""
        if self._calls is not None:
            return self._calls.tableau.prior_std
        return self._schedule.prior_std(self.sampler.points(self._schedule)[0].t)

    def __len__(self) -> int:
        return self.trained.steps

    # ---- the loop ------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The state as the network sees it: c_in times it for EDM networks, itself for all others."""
        if self.trained.prediction != "edm":
            return sample
        t = self._begun(timestep).t
        scaled, _ = predictions.network_input(
            "edm", sample, t, *self._schedule.alpha_sigma(t), self._sigma_data
        )
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> KitSchedulerOutput | tuple[Tensor, Tensor]:
        """From one network call to the next.

        Args:
            model_output: (b, c, ...) the network's answer at ``sample``; channels beyond the sample's (a
                learned variance) are left out.
            timestep: the entry of ``timesteps`` it was evaluated at; read on the first call only.
            sample: (b, c, ...) the state, as the last call returned it or as the pipeline changed it.
            generator: of the noise; a list holds one a sample.
            return_dict: False for a plain tuple.
            others: ``eta`` and ``use_clipped_model_output`` as some pipelines pass them, unless they ask for
                what the sampler was not made with.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, of sample's dtype.

        Raises:
            KitError: no ``set_timesteps`` yet, a time that is not one of ``timesteps``, other arguments.
        """
        self._refuse(others)
        run = self._begun(timestep)
        x0 = self._x0(model_output, sample, run.t)
        state = run.advance(sample, x0, generator)
        if run.finished:
            self._run = self._begin = None
        out = state.to(sample.dtype)
        run.remember(out, state)
        return KitSchedulerOutput(out, x0) if return_dict else (out, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at ``timesteps`` (b,), given as the network is told them."""
        native = self.trained.native(timesteps.reshape(-1)).to(original_samples.device)
        return self._schedule.add_noise(original_samples, noise, native.expand(len(original_samples)))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` by the name and order of arguments that pipelines of flow models use."""
        return self.add_noise(sample, noise, timestep)

    def _x0(self, output: Tensor, sample: Tensor, t: float) -> Tensor:
        trained = self.trained
        denoise = denoise_fn(
            lambda x, told: trained.sign * output,
            self._schedule,
            trained.prediction,
            guidance=() if trained.threshold is None else (trained.threshold,),
            sigma_data=self._sigma_data,
            clip=trained.clip,
        )
        return denoise(sample, t)

    def _begun(self, timestep: float | Tensor | None) -> Run:
        """The run in progress, or a new one from the call that ``timestep`` names."""
        if self._run is not None:
            return self._run
        if self._calls is None:
            raise KitError("call set_timesteps before step")
        call = self._call_at(timestep) if self._begin is None else self._begin
        calls = self._calls if call == 0 else self._rest(self._calls, call)
        self._run = Run(calls)
        return self._run

    def _call_at(self, timestep: float | Tensor | None) -> int:
        """The first call of a step at this time, or else any at it."""
        assert self._calls is not None
        told = self.timesteps.double().cpu()
        near = (told - float(timestep if timestep is not None else told[0])).abs() <= 1e-6 * (1 + told.abs())
        found = near.nonzero().flatten().tolist()
        if not found:
            raise KitError(f"time {float(timestep):g} is not one of timesteps")  # type: ignore[arg-type]
        return next((call for call in found if self._calls.starts(call)), found[0])

    def _rest(self, calls: Calls, call: int) -> Calls:
        """A run that begins at a later call: the sampler on what is left of the grid, without history."""
        name, total = calls.tableau.sampler, len(calls.evaluations)
        refusal = f"sampler {name!r} cannot begin with call {call} of {total}; choose another strength"
        if not 0 < call < total or not calls.starts(call):
            raise KitError(refusal)
        times = list(calls.tableau.times[calls.steps[call] :])
        left = times[:-1] if calls.tableau.end[1] == 0 else times
        rest = Calls.of(self.sampler.tableau(self._schedule, timesteps=left))
        if len(rest.evaluations) != total - call:
            raise KitError(refusal)
        return rest

    def _refuse(self, others: dict[str, Any]) -> None:
        known = {
            "eta": (None, 0, 0.0, getattr(self.sampler, "eta", 0.0)),
            "use_clipped_model_output": (None, False),
        }
        for key, value in others.items():
            if value not in known.get(key, ()):
                raise KitError(
                    f"step has no argument {key}={value!r}; make the scheduler with the option instead"
                )

    # ---- numbers -------------------------------------------------------------------------------------------

    @property
    def _is_flow(self) -> bool:
        return self._schedule.name == "flow"

    @property
    def _sigma_data(self) -> float:
        return getattr(self._schedule, "sigma_data", 0.5)

    def _shifted(self, mu: float | None) -> Schedule:
        return shifted(self.trained.schedule, mu, self.config.get("time_shift_type", "exponential"))

    def _told(self, times: list[float], device: torch.device | str | None) -> Tensor:
        """(n,) as pipelines pass them on: int64 where all are whole and the schedule is, else float32."""
        told = self.trained.told(torch.tensor(times, dtype=torch.float64))
        whole = self._schedule.discrete and (told == told.round()).all()
        return told.to(torch.int64 if whole else torch.float32).to(device or "cpu")

    def _ratios(self, times: list[float]) -> Tensor:
        """(n,) float32 sigma of each time, as diffusers counts it: sigma / alpha, or a flow's own sigma."""
        alpha, sigma = self._schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64))
        return (sigma if self._is_flow else sigma / alpha).float()

"""Recorded runs of a peer's schedulers: their options, schedules, grids, networks and noise.

Which sampler of ours replays a run, and with which options, is what the translators say
(``golden_deterministic`` and ``golden_stochastic``). They read a run's options through ``Golden.option``; an
option that nobody reads, or a value that nobody knows, is a failure.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagen_kit import schedules
from imagen_kit.samplers.grid import Point
from imagen_kit.schedules.base import DiscreteSchedule, Schedule, log_alpha2_of_betas

FOLDER = Path(os.environ.get("IMAGEN_KIT_GOLDENS") or Path(__file__).parents[1] / "data" / "samplers")

#: Two noise levels whose ratio is nearer to 1 than this are the same: tables are rounded differently.
SAME = 1e-12

_FLAG = (False, True, None)
_NUMBER = (int, float)
#: Options that only choose the grid, which is recorded, or what the network is asked for, which its closed
#: form makes all the same: name -> the values (or types) known for it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "time_shift_type": ("exponential", "linear"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    **dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), _FLAG
    ),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting", "set_alpha_to_one"), _FLAG),
    **dict.fromkeys(("steps_offset", "base_image_seq_len", "max_image_seq_len"), (int,)),
    **dict.fromkeys(("shift", "flow_shift", "base_shift", "max_shift", "rho", "lambda_min_clipped"), _NUMBER),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), (*_NUMBER, None)),
}
#: Arguments of ``set_timesteps``: all of them choose the grid.
GRID_ARGUMENTS = {"num_inference_steps", "timesteps", "sigmas", "mu", "original_inference_steps", "strength"}

#: Default betas of the classes whose defaults are not linear, 1e-4 to 0.02.
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
BETAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), LATENT
    ),
    "LCMScheduler": {**LATENT, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**LATENT, "beta_schedule": "scaled_linear"},
}


class UnknownRunError(AssertionError):
    """A scheduler, option or value that no translator knows."""


class RatioSchedule(Schedule):
    """Variance-preserving, told sigma / alpha itself: for tables that reach beyond their own schedule."""

    name, t_min, t_max, domain = "ratio", 1e-9, 1e9, (0.0, math.inf)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = (1 + t * t).rsqrt()
        return alpha, t * alpha

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()


@dataclass(frozen=True)
class Golden:
    """One recorded run."""

    group: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    gmm: dict[str, Any]
    read: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.group}-{self.meta['key']}-{self.meta['id']}"

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def scheduler(self) -> str:
        return str(self.meta["scheduler"])

    @property
    def kind(self) -> str:
        return str(self.meta["kind"])

    @property
    def flow(self) -> bool:
        return bool(self.meta["flow"]) or self.kind == "flow"

    @property
    def calls(self) -> int:
        return len(self["eval_alpha"])

    # ---- options -------------------------------------------------------------------------------------------

    def option(self, name: str, default: Any, known: Sequence[Any] | None = None) -> Any:
        """The value of a constructor argument, one of ``known`` (when given: values, or types for numbers)."""
        return self._value(self.meta["config"], name, default, known)

    def argument(self, name: str, default: Any, known: Sequence[Any] | None = None) -> Any:
        """The value of an argument of ``step``."""
        return self._value(self.meta["step_kwargs"], name, default, known)

    def _value(self, source: dict[str, Any], name: str, default: Any, known: Sequence[Any] | None) -> Any:
        self.read.add(name)
        value = source.get(name, default)
        if known is not None and not _is_known(value, known):
            raise UnknownRunError(f"{self}: {name}={value!r} is not known")
        return value

    def check_read(self) -> None:
        """Every option has been read by a translator, or only moves the recorded grid."""
        if self.flow or self.kind == "edm":
            self.read.update(("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"))
        for name, value in self.meta["config"].items():
            if name not in self.read and not (name in NEUTRAL and _is_known(value, NEUTRAL[name])):
                raise UnknownRunError(f"{self}: constructor argument {name}={value!r} is not known")
        unknown = self.meta["step_kwargs"].keys() - self.read
        unknown |= self.meta["set_timesteps_kwargs"].keys() - GRID_ARGUMENTS
        if unknown:
            raise UnknownRunError(f"{self}: arguments {sorted(unknown)} are not known")

    # ---- schedule and grid ---------------------------------------------------------------------------------

    @cached_property
    def schedule(self) -> Schedule:
        """Our schedule: the one of the run's options, or sigma / alpha itself where its table lies outside."""
        if self.flow:
            return schedules.create("flow")
        if self.kind == "edm":
            return schedules.create("edm")
        made = self._trained_schedule()
        if self.kind == "vp_discrete":
            return made
        noisiest, cleanest = (_ratio(*made.alpha_sigma(t)) for t in (made.t_max, made.t_min))
        levels = [level for level in self.levels if level > 0]
        # Churn raises a level by up to sqrt(2), also above all that the schedule knows.
        highest = max(levels) * (math.sqrt(2) if self.meta["step_kwargs"].get("s_churn") else 1.0)
        fits = highest <= noisiest * (1 + SAME) and min(levels) >= cleanest * (1 - SAME)
        return made if fits else RatioSchedule()

    def _trained_schedule(self) -> Schedule:
        defaults = {
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            **BETAS.get(self.scheduler, {}),
        }
        start, end = (self.option(name, defaults[name], _NUMBER) for name in ("beta_start", "beta_end"))
        kind, trained = (
            self.option("beta_schedule", defaults["beta_schedule"]),
            self.option("trained_betas", None),
        )
        count = self.option("num_train_timesteps", 1000, (int,))
        zero = self.option("rescale_betas_zero_snr", False, _FLAG) or False
        if trained is None and kind in ("linear", "scaled_linear"):
            return schedules.create(  # type: ignore[no-any-return]
                kind, beta_start=start, beta_end=end, timesteps=count, zero_terminal_snr=zero
            )
        betas = trained_betas(kind, start, end, count) if trained is None else torch.tensor(trained).double()
        return DiscreteSchedule(log_alpha2_of_betas(betas), zero_terminal_snr=zero)

    @cached_property
    def levels(self) -> list[float]:
        """sigma / alpha of every call, and of the state the last one lands on."""
        pairs = zip(self["eval_alpha"].tolist(), self["eval_sigma"].tolist(), strict=True)
        if "sigmas" in self.tensors:  # the table itself; some peers' summary of its end is not what they did
            end = self["sigmas"][self.calls].item()
            last = end / (1 - end) if self.flow else end
        else:
            last = _ratio(*(self.meta["final_alpha_sigma"] or (1.0, 0.0)))
        return [*(_ratio(alpha, sigma) for alpha, sigma in pairs), last]

    @property
    def stalls(self) -> bool:
        """Whether the table repeats its last sigma, so that the last call is a step of no length."""
        return self.levels[-1] >= self.levels[-2] * (1 - SAME)

    def points(self, stages: int = 1) -> list[Point]:
        """Where the steps start, and the end; ``stages`` calls make a step."""
        if self.kind == "vp_discrete":
            return [*(self.at(t) for t in self["timesteps"].tolist()[::stages]), self.point(self.levels[-1])]
        starts = self.levels[:-1:stages]
        grid = starts[:1] + [level for before, level in pairwise(starts) if level < before * (1 - SAME)]
        end = grid[-1] if self.stalls else self.levels[-1]  # the very same, so that no length is exactly none
        return [self.point(level) for level in (*grid, end)]

    def point(self, level: float) -> Point:
        """Our point at a recorded sigma / alpha, or the clean end."""
        t = self.schedule.t_of_ratio(level)
        return Point(t, *(self.schedule.alpha_sigma(t) if level else (1.0, 0.0)))

    def at(self, t: float) -> Point:
        """Our point at a native time."""
        return Point(t, *self.schedule.alpha_sigma(t))

    # ---- network and noise ---------------------------------------------------------------------------------

    def mixture(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[noise | x]) of the run's mixture for x (b, 2) = alpha x0 + sigma noise, in closed form."""
        weights, means, stds = (
            torch.tensor(self.gmm[k], dtype=x.dtype) for k in ("weights", "means", "stds")
        )
        variance = alpha**2 * stds**2 + sigma**2
        offset = x[:, None] - alpha * means
        score = weights.log() - 0.5 * (offset**2 / variance).sum(-1) - 0.5 * variance.log().sum(-1)
        shares = torch.softmax(score, 1)[..., None]
        x0 = (shares * (means + alpha * stds**2 / variance * offset)).sum(1)
        return x0, (shares * (sigma / variance * offset)).sum(1)

    def noise_of_call(self, call: int) -> list[Tensor]:
        """The Gaussian tensors the peer drew in a call, in order."""
        if "noise" not in self.tensors:
            return []
        return [n for n, at in zip(self["noise"], self["noise_step"].tolist(), strict=True) if at == call]

    def limiter(self, clips_by_default: bool = False) -> Callable[[Tensor], Tensor]:
        """The clipping or dynamic thresholding of x0 in the run; points are pictures of two numbers."""
        thresholds = self.option("thresholding", False, _FLAG)
        share = self.option("dynamic_thresholding_ratio", 0.995, _NUMBER)
        most = self.option("sample_max_value", 1.0, _NUMBER)
        clips = self.option("clip_sample", clips_by_default, _FLAG)
        reach = self.option("clip_sample_range", 1.0, _NUMBER)

        def threshold(x0: Tensor) -> Tensor:
            limit = torch.quantile(x0.abs(), share, dim=1, keepdim=True).clamp(1, most)
            return x0.clamp(-limit, limit) / limit

        if thresholds:
            return threshold
        return (lambda x0: x0.clamp(-reach, reach)) if clips else unlimited


def unlimited(x0: Tensor) -> Tensor:
    return x0


def trained_betas(kind: str, start: float, end: float, count: int) -> Tensor:
    """Betas of the schedules that peers define by a formula for alpha² (capped at 0.999), or a sigmoid."""
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start
    t = torch.arange(count + 1, dtype=torch.float64) / count
    if kind == "squaredcos_cap_v2":
        alpha2 = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    elif kind == "exp":
        alpha2 = torch.exp(-12 * t)
    elif kind == "laplace":
        alpha2 = torch.sigmoid(-0.5 * torch.sign(0.5 - t) * torch.log(1 - 2 * (0.5 - t).abs() + 1e-6)).sqrt()
    else:
        raise UnknownRunError(f"beta_schedule={kind!r} is not known")
    return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)


def _ratio(alpha: float, sigma: float) -> float:
    return sigma / alpha if alpha else math.inf


def _is_known(value: Any, known: Sequence[Any]) -> bool:
    types = tuple(k for k in known if isinstance(k, type))
    return value in [k for k in known if k not in types] or (
        bool(types) and isinstance(value, types) and not isinstance(value, bool)
    )


@lru_cache
def load(folder: Path = FOLDER) -> list[Golden]:
    """All runs of all files of a folder."""
    goldens = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if "runs" not in meta:
                continue
            names: dict[str, list[str]] = {}
            for name in file.keys():  # noqa: SIM118 (no iterator of its own)
                names.setdefault(name.partition(".")[0], []).append(name)
            for run in json.loads(meta["runs"]):
                own = {name.partition(".")[2]: file.get_tensor(name) for name in names[run["key"]]}
                goldens.append(Golden(path.stem, run, own, json.loads(meta["gmm"])))
    return goldens

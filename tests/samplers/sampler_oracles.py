"""Exact networks, recorded runs and an eager runner that the sampler tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from imagen_kit import schedules
from imagen_kit.samplers.grid import Point
from imagen_kit.schedules.base import Schedule

DATA = Path(__file__).parents[1] / "data" / "samplers"

#: The mixture all recorded runs are about: weights, means and standard deviations of four 2-D Gaussians.
MIXTURE = {
    "weights": [0.35, 0.25, 0.3, 0.1],
    "means": [[-1.2, 0.6], [0.9, 1.1], [0.3, -0.9], [1.6, -0.2]],
    "stds": [[0.25, 0.35], [0.3, 0.2], [0.4, 0.25], [0.15, 0.3]],
}


def mixture_x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x0 | x] of the mixture for x (b, 2) = alpha x0 + sigma noise, in closed form."""
    weights, means, stds = (torch.tensor(MIXTURE[k], dtype=x.dtype) for k in ("weights", "means", "stds"))
    variance = alpha**2 * stds**2 + sigma**2
    offset = x[:, None] - alpha * means
    score = weights.log() - 0.5 * (offset**2 / variance).sum(-1) - 0.5 * variance.log().sum(-1)
    answer = means + alpha * stds**2 / variance * offset
    return (torch.softmax(score, 1)[..., None] * answer).sum(1)


def mixture_denoiser(schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    """The ideal network of the mixture on a schedule."""
    return lambda x, t: mixture_x0(x, *schedule.alpha_sigma(t))


def gaussian_denoiser(schedule: Schedule, mean: float, std: float) -> Callable[[Tensor, float], Tensor]:
    """The ideal network where every number of the data is Gaussian, independently."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


@lru_cache
def group(name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(runs, tensors) of one file of recorded runs."""
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        runs = json.loads(file.metadata()["runs"]) if "runs" in file.metadata() else []
        return runs, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)


def run_schedule(run: dict[str, Any]) -> Schedule:
    """The schedule a recorded run was made on."""
    config = run["config"]
    if run["flow"] or run["kind"] == "flow":
        return schedules.create("flow")
    if run["kind"] == "edm":
        return schedules.create("edm")
    zero = config.get("rescale_betas_zero_snr", False)
    if config["beta_schedule"] == "squaredcos_cap_v2":
        return schedules.create("cosine", timesteps=1000, zero_terminal_snr=zero)
    betas = {key: config[key] for key in ("beta_start", "beta_end")}
    return schedules.create(config["beta_schedule"], zero_terminal_snr=zero, **betas)


class EagerRun:
    """The same interface as a traced run, computing on tensors: a formula run the plain way."""

    def __init__(
        self,
        schedule: Schedule,
        points: list[Point],
        denoise: Callable[..., Tensor],
        noise: Callable[[], Tensor],
    ):
        self.schedule, self.points = schedule, points
        self._denoise, self.noise = denoise, noise
        self.states: list[Tensor] = []

    @property
    def steps(self) -> list[tuple[int, Point, Point]]:
        return [(i, now, then) for i, (now, then) in enumerate(pairwise(self.points))]

    def denoise(self, x: Tensor, at: Point, also: tuple[str, ...] = ()) -> Tensor | tuple[Tensor, ...]:
        return self._denoise.parts(x, at.t, also) if also else self._denoise(x, at.t)  # type: ignore[attr-defined]

    def keep(self, x: Tensor) -> Tensor:
        return x

    def point(self, lam: float) -> Point:
        t = self.schedule.t_of_log_snr(2 * lam)
        return Point(t, *self.schedule.alpha_sigma(t))

    def step(self, x: Tensor) -> Tensor:
        self.states.append(x)
        return x

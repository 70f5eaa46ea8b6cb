"""One diffusion model of a cascade, and what a run of it is made of.

Axes: b pictures of one batch, c h w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import codecs
from imagen_kit.caches import base as caches
from imagen_kit.cascade import LowRes, check_level
from imagen_kit.codecs.base import Codec
from imagen_kit.conditioning import Cond
from imagen_kit.denoise import EXECUTIONS, Denoise, denoise_fn
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.base import TEXT, Guidance, require, stack
from imagen_kit.performance.options import Performance
from imagen_kit.performance.precision import computing_dtype, picture_dtype


@dataclass(frozen=True)
class Stage:
    """One diffusion model of a cascade.

    Attributes:
        name: what it is called in settings, e.g. ``base``.
        denoiser: ``denoiser(x, t, cond)``; from the second stage on it reads ``cond.low_res``.
        schedule, prediction: what it was trained with.
        sampler: a sampler.
        size: side of its picture in pixels.
        steps: sampler steps; None = the sampler's default.
        guidance: strategies in the order they act.
        codec: between pictures and what is diffused.
        low_res_level: noise-conditioning augmentation in [0, 1], from the second stage on.
        low_res: how the stage is shown the picture before it.
        text_encoder: the stage's own, like the pipeline's; None for that one.
        sigma_data: spread of the data, for ``edm``.
        networks: further networks by name that guidance asks for, called like the denoiser: a weak one.
        told: numbers that the network is told besides the prompt: ``size`` (a list), ``guidance``.
        execution: what guidance evaluates together: ``batched`` in one call, or ``split``, for less memory.
        performance: how the networks are run. ``graph`` and ``remember_text`` are the pipeline's to heed; the
            rest has been done to the networks by ``imagen_kit.performance.apply``.
        cache: what is kept of the network's inner results from step to step, of ``imagen_kit.caches``.
    """

    name: str
    denoiser: nn.Module
    schedule: Any
    prediction: str
    sampler: Any
    size: int
    steps: int | None = None
    guidance: tuple[Guidance, ...] = ()
    codec: Codec = field(default_factory=lambda: codecs.create("pixel"))
    low_res_level: float = 0.0
    low_res: LowRes = field(default_factory=LowRes)
    text_encoder: Any = None
    sigma_data: float = 0.5
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    execution: str = "batched"
    told: Mapping[str, Any] = field(default_factory=dict)
    performance: Performance = field(default_factory=Performance)
    cache: Any = None

    def __post_init__(self) -> None:
        check_level(self.low_res_level, f"low_res_level of stage {self.name!r}")
        if self.execution not in EXECUTIONS:
            raise KitError(unknown("guidance execution", self.execution, EXECUTIONS))
        object.__setattr__(self, "guidance", stack(self.guidance))
        object.__setattr__(self, "cache", caches.build(self.cache))
        object.__setattr__(self, "steps", check_steps(self.steps))
        if self.size < 1 or self.size % self.codec.factor:
            raise KitError(f"stage {self.name!r}: size {self.size} is not a multiple of {self.codec.factor}")

    @property
    def modules(self) -> list[nn.Module]:
        """The denoiser and the further networks."""
        return [self.denoiser, *self.networks.values()]

    @property
    def reads(self) -> set[str]:
        """Names of the conditionings that its guidance asks for."""
        return {branch.cond for strategy in self.guidance for branch in strategy.needs}

    def require(self, names: Sequence[str]) -> None:
        """KitError unless guidance and cache find what they need: conditionings among ``names``, networks, layers."""
        texts = [name for name in self.reads if name.startswith(TEXT) and name != TEXT]
        for strategy in self.guidance:
            require(strategy, [*names, *texts], self.networks)
            strategy.fit(self.denoiser)
        if self.cache is not None:
            self.cache.fit(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the denoiser computes in."""
        return computing_dtype(self.denoiser)

    @property
    def picture_dtype(self) -> torch.dtype:
        """The dtype the denoiser is fed with: float32 where its first layer is kept so."""
        return picture_dtype(self.denoiser)


class Counted:
    """A guided denoiser that ticks at every evaluation and draws guidance's noise from the samples' own."""

    def __init__(self, denoise: Denoise, generators: list[torch.Generator], tick: Callable[[], None]):
        self._denoise, self._generators, self._tick = denoise, generators, tick

    def begin(self, times: Any, generator: Any = None, parts: Sequence[str] = ()) -> Counted:
        run = self._denoise.begin(times, self._generators, parts)
        return Counted(run, self._generators, self._tick)

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        x0 = self._denoise(x, t)
        self._tick()
        return x0

    def parts(self, x: Tensor, t: float | Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        found = self._denoise.parts(x, t, names)
        self._tick()
        return found

    def with_variance(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        found = self._denoise.with_variance(x, t)
        self._tick()
        return found


def denoiser(stage: Stage, conds: Mapping[str, Cond]) -> Denoise:
    """The stage's guided denoiser for conditionings by name, ``cond`` among them."""
    return denoise_fn(
        stage.denoiser,
        stage.schedule,
        stage.prediction,
        cond=conds["cond"],
        uncond=conds.get("uncond"),
        others={name: cond for name, cond in conds.items() if name not in ("cond", "uncond")},
        networks=stage.networks,
        guidance=stage.guidance,
        execution=stage.execution,
        sigma_data=stage.sigma_data,
        dtype=stage.picture_dtype,
        cache=stage.cache,
        remember_text=stage.performance.remember_text,
    )


def start(stage: Stage) -> tuple[float, int]:
    """(standard deviation of the starting noise, network calls); KitError where parts do not fit.

    Of a sampler that is not linear, and so has no tableau, the calls are its steps.
    """
    sampler, schedule = stage.sampler, stage.schedule
    try:
        tableau = sampler.tableau(schedule, stage.steps)
        return tableau.prior_std, tableau.nfe
    except NotImplementedError:
        first, *rest = sampler.points(schedule, stage.steps)  # not linear, so without a tableau
        return schedule.prior_std(first.t), len(rest)


def check_steps(steps: object) -> int | None:
    """Sampler steps, or None for the sampler's default; KitError unless a whole number of at least 1."""
    check_count(steps, "steps", optional=True)
    return steps  # type: ignore[return-value]


def check_count(value: object, what: str, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KitError(f"{what} must be a whole number of at least 1, got {value!r}")

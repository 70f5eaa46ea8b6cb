"""diffusers, both ways: our samplers in its pipelines, its models and schedules in ours.

pipe.scheduler = interop.diffusers.scheduler("dpmpp_2m", like=pipe.scheduler, spacing="karras")

network = interop.diffusers.denoiser(pipe)
schedule, prediction = interop.diffusers.schedule(pipe.scheduler)
denoise = denoise_fn(network, schedule, prediction, cond=Cond(tokens=...))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_kit import schedules
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.base import Guidance
from imagen_kit.guidance.dynamic_threshold import DynamicThreshold
from imagen_kit.schedules.base import DiscreteSchedule, Schedule, log_alpha2_of_betas

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
#: Their schedule by ours, where we have it; ``laplace`` and ``exp`` are computed below.
NAMED = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


@dataclass(frozen=True)
class Trained:
    """What a diffusers scheduler's config says about the network.

    Attributes:
        schedule: noise schedule.
        prediction: what the network answers, by our name.
        sign: -1 where its answer is the negative of ours (EDM with ``v_prediction``).
        steps: number of training steps; pipelines of flow models count time from 0 to it.
        clip: bound of |x0|, or None.
        threshold: dynamic thresholding, or None.
    """

    schedule: Schedule
    prediction: str
    sign: int = 1
    steps: int = 1000
    clip: float | None = None
    threshold: Guidance | None = None

    def told(self, t: Tensor) -> Tensor:
        """What a pipeline hands the network for native times t (float64)."""
        if self.prediction == "edm":
            return t.log() / 4
        return t if self.schedule.discrete else t * self.steps

    def native(self, told: Tensor) -> Tensor:
        """Inverse of ``told``, float64."""
        told = told.double()
        if self.prediction == "edm":
            return (4 * told).exp()
        return told if self.schedule.discrete else told / self.steps


def library() -> Any:
    """The module ``diffusers``.

    Raises:
        KitError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise KitError(
            "diffusers is not installed; install it with: pip install 'imagen-kit[diffusers]'"
        ) from error
    return diffusers


def schedule(config: Any) -> tuple[Schedule, str]:
    """Our schedule and prediction for what a diffusers scheduler was configured for.

    Args:
        config: a scheduler of diffusers, its config, or a pipeline that has one. Needs no diffusers installed
            when it is a plain dict, as in a ``scheduler_config.json``.

    Returns:
        (schedule, prediction), as ``denoise_fn`` takes them.

    Raises:
        KitError: a schedule or prediction we do not have.
    """
    trained = read(config)
    if trained.sign < 0:
        raise KitError(
            "an EDM network with v_prediction answers the negative of ours; negate it and use 'edm'"
        )
    return trained.schedule, trained.prediction


def read(config: Any) -> Trained:
    """All a config says about the network; see ``schedule``."""
    ours = getattr(getattr(config, "scheduler", config), "trained", None)
    if isinstance(ours, Trained):  # a scheduler of ours
        return ours
    options = config_of(config)
    kind = str(options.get("like") or options.get("_class_name", ""))
    said = options.get("prediction_type") or "epsilon"
    if said not in PREDICTIONS:
        raise KitError(unknown("prediction_type of diffusers", said, PREDICTIONS))
    steps = int(options.get("num_train_timesteps", 1000))
    bounds = _bounds(options)
    if kind.startswith("EDM"):
        names = ("sigma_min", "sigma_max", "sigma_data")
        edm = schedules.create("edm", **{key: options[key] for key in names if key in options})
        if said not in ("epsilon", "v_prediction"):
            raise KitError(f"an EDM scheduler has prediction_type epsilon or v_prediction, not {said!r}")
        return Trained(edm, "edm", -1 if said == "v_prediction" else 1, steps, **bounds)
    if kind.startswith("FlowMatch") or said == "flow_prediction" or options.get("use_flow_sigmas"):
        # A dynamic shift comes with every run, and then takes the place of this one.
        fixed = options.get("shift", options.get("flow_shift"))
        shift = 1.0 if options.get("use_dynamic_shifting") or fixed is None else fixed
        return Trained(schedules.create("flow", shift=float(shift)), "flow", 1, steps, **bounds)
    return Trained(_discrete(options, steps), PREDICTIONS[said], 1, steps, **bounds)


def config_of(config: Any) -> dict[str, Any]:
    """The plain dict of a config, of a scheduler's, or of a pipeline's scheduler's, with its class's name."""
    config = getattr(config, "scheduler", config)
    options = getattr(config, "config", config)
    if not isinstance(options, Mapping):
        raise KitError(f"expected a scheduler of diffusers or its config, not {type(config).__name__}")
    return dict(options) if options is config else {"_class_name": type(config).__name__, **options}


def _bounds(options: Mapping[str, Any]) -> dict[str, Any]:
    """How x0 is kept within range: thresholding goes before clipping, as there."""
    if options.get("thresholding"):
        ratio, cap = options.get("dynamic_thresholding_ratio", 0.995), options.get("sample_max_value", 1.0)
        return {"threshold": DynamicThreshold(ratio, cap)}
    return {"clip": float(options.get("clip_sample_range", 1.0)) if options.get("clip_sample") else None}


def _discrete(options: Mapping[str, Any], steps: int) -> Schedule:
    """The schedule of T betas."""
    name = options.get("beta_schedule", "linear")
    zero = bool(options.get("rescale_betas_zero_snr", False))
    start, end = options.get("beta_start", 1e-4), options.get("beta_end", 0.02)
    given = options.get("trained_betas")
    if given is None and name in NAMED:
        betas = {} if name == "squaredcos_cap_v2" else {"beta_start": start, "beta_end": end}
        return schedules.create(NAMED[name], timesteps=steps, zero_terminal_snr=zero, **betas)
    if given is None and name not in BETAS:
        raise KitError(unknown("beta_schedule of diffusers", name, BETAS))
    values = _betas(name, steps, start, end) if given is None else torch.as_tensor(given, dtype=torch.float64)
    return DiscreteSchedule(log_alpha2_of_betas(values), zero_terminal_snr=zero, name=str(name))


def _betas(name: str, steps: int, start: float, end: float) -> Tensor:
    """(T,) betas of the schedules that only diffusers has: a sigmoid from start to end, or from alpha_bar(t)."""
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    if name == "exp":
        bar = torch.exp(-12 * t)
    else:  # laplace: log-SNR/2 of a Laplace distribution, and alpha_bar the root of what it gives
        half = -0.5 * torch.copysign(torch.ones_like(t), 0.5 - t) * torch.log(1 - 2 * (0.5 - t).abs() + 1e-6)
        bar = torch.sigmoid(half).sqrt()
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def scheduler(
    sampler: Any,
    like: Any = None,
    *,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    **options: Any,
) -> Any:
    """One of our samplers as a scheduler for a diffusers pipeline.

    It keeps the surface pipelines use (``set_timesteps``, ``timesteps``, ``sigmas``, ``init_noise_sigma``,
    ``order``, ``scale_model_input``, ``step``, ``add_noise``, ``set_begin_index``, ``config``). Every network
    call of the sampler is one of its ``timesteps``; those are real numbers where the spacing says so. Noise,
    multistep history and two-stage steps are the sampler's own, and its coefficients float64, on the host.

    Args:
        sampler: a sampler's name, or a sampler.
        like: the pipeline's scheduler, its config, or the pipeline: tells the noise schedule, the prediction,
            clipping and thresholding. None = Stable Diffusion's.
        schedule: noise schedule in place of the one ``like`` tells.
        prediction: eps, x0, v, flow or edm, in place of the one ``like`` tells.
        options: of the sampler: ``spacing``, ``final``, ``eta`` and so on. What ``like`` says about those is
            not read.

    Raises:
        KitError: diffusers is not installed; an unknown sampler, option, schedule or prediction.
    """
    library()
    from imagen_kit.interop.diffusers_scheduler import build

    return build(sampler, like, schedule, prediction, options)


def denoiser(model: Any, *, time_scale: float | None = None, embedded_guidance: float = 3.5) -> Any:
    """A diffusers model as one of our denoisers: ``network(x, t, cond)``, an ``nn.Module``.

    Takes U-Nets (``UNet2DModel``, ``UNet2DConditionModel``) and transformers (``DiTTransformer2DModel``,
    ``PixArtTransformer2DModel``, ``SD3Transformer2DModel``, ``FluxTransformer2DModel`` and others of the same
    signature). ``cond`` gives ``tokens``, ``mask``, ``pooled``, ``labels``, ``size`` and ``low_res``.

    Args:
        model: the model, or a pipeline, whose ``unet`` or ``transformer`` is taken.
        time_scale: factor from our native time to what the model is told; None = the model's own convention
            (1000 for SD3 and Sana on the flow schedule, 1 for all others).
        embedded_guidance: the guidance scale that distilled models such as FLUX.1-dev are told.

    Raises:
        KitError: not a model with the arguments above.
    """
    from imagen_kit.interop.diffusers_model import DiffusersDenoiser

    return DiffusersDenoiser(model, time_scale, embedded_guidance)


def shifted(schedule: Schedule, mu: float | None, kind: str = "exponential") -> Schedule:
    """The flow schedule with the resolution-dependent shift that pipelines pass as mu.

    The shift is e^mu (Esser et al. 2024, section 5.3.2), or mu itself where ``kind`` is ``linear``.
    """
    if mu is None:
        return schedule
    if schedule.name != "flow":
        raise KitError(f"mu shifts flow schedules only, not {schedule.name!r}")
    shift = math.exp(mu) if kind == "exponential" else mu
    return schedules.create("flow", shift=shift, t_min=schedule.t_min, t_max=schedule.t_max)

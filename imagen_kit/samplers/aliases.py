"""Other projects' names for our samplers: diffusers' classes, k-diffusion's functions, ComfyUI and A1111 labels.

``samplers.create`` accepts every key of ``ALIASES``, in any case; options given beside it go first. An alias
stands for the method as that project runs it (order lowered at the end or not, variant, spacing); the weights
of two projects on the same grid still differ in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from imagen_kit.errors import KitError, unknown

Config = Mapping[str, Any]
Options = dict[str, Any]
Alias = tuple[str, Options]


class _Missing(Exception):
    """A config for which there is no sampler here."""


# ---- k-diffusion and ComfyUI ---------------------------------------------------------------------------------

#: Neither project lowers the order before its last step, which goes to sigma = 0.
_FULL: Options = {"lower_order_final": False}

#: k-diffusion's ``sample_*`` without the prefix; ComfyUI has the same names. The grid is the caller's there.
_K_DIFFUSION: dict[str, Alias] = {
    "euler": ("euler", {}),
    "euler_ancestral": ("euler_ancestral", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm2", {}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}),
    "lms": ("lms", {}),
    "dpm_fast": ("dpm_solver_3s", {"spacing": "log_snr"}),
    "dpm_adaptive": ("dpm_adaptive", {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_2m": ("dpmpp_2m", _FULL),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", _FULL),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", _FULL),
}

_COMFYUI: dict[str, Alias] = {
    "dpmpp_sde_gpu": ("dpmpp_sde", {}),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", _FULL),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {**_FULL, "kind": "heun"}),
    "dpmpp_2m_sde_heun_gpu": ("dpmpp_2m_sde", {**_FULL, "kind": "heun"}),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", _FULL),
    "euler_cfg_pp": ("euler", {"renoise": "uncond"}),
    "euler_ancestral_cfg_pp": ("euler_ancestral", {"renoise": "uncond"}),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m", {**_FULL, "renoise": "uncond"}),
    "ipndm_v": ("ipndm", {"variable_step": True}),
    "uni_pc": ("unipc", {"variant": "bh1", "order": 3}),
    "uni_pc_bh2": ("unipc", {"variant": "bh2", "order": 3}),
}

# ---- A1111 ---------------------------------------------------------------------------------------------------

#: Labels of samplers; alone they step evenly in time, from the noisiest to the cleanest.
_LABELS: dict[str, Alias] = {
    "Euler": ("euler", {}),
    "Euler a": ("euler_ancestral", {}),
    "Heun": ("heun", {}),
    "LMS": ("lms", {}),
    "DPM2": ("dpm2", {}),
    "DPM2 a": ("dpm2_ancestral", {}),
    "DPM++ 2S a": ("dpmpp_2s_ancestral", {}),
    "DPM++ SDE": ("dpmpp_sde", {}),
    "DPM++ 2M": ("dpmpp_2m", _FULL),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", _FULL),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde", {**_FULL, "kind": "heun"}),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", _FULL),
    "UniPC": ("unipc", {"variant": "bh1", "order": 3}),
    "LCM": ("lcm", {}),
}
#: Schedule types that a label may end in → our spacing.
_TYPES = {
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "trailing",
    "Beta": "beta",
    "Align Your Steps": "align_your_steps",
}
#: Labels whose grid belongs to the method.
_FIXED: dict[str, Alias] = {
    "DPM fast": ("dpm_solver_3s", {"spacing": "log_snr"}),
    "DPM adaptive": ("dpm_adaptive", {}),
    "DDIM": ("ddim", {"spacing": "leading", "offset": 1}),
    "DDIM CFG++": ("ddim", {"spacing": "leading", "offset": 1, "renoise": "uncond"}),
    "PLMS": ("plms", {"spacing": "leading", "offset": 1, "skip_prk_steps": True}),
    "Restart": ("restart", {}),
}


def _a1111() -> dict[str, Alias]:
    table = dict(_FIXED)
    for label, (name, options) in _LABELS.items():
        # LCM's times are those it was distilled on.
        table[label] = (name, options if name == "lcm" else {"spacing": "linspace", **options})
        for kind, spacing in _TYPES.items() if name != "lcm" else ():
            table[f"{label} {kind}"] = (name, {**options, "spacing": spacing})
    return table


# ---- diffusers -----------------------------------------------------------------------------------------------


def _grid(config: Config, default: str) -> Options:
    """Spacing, offset and end by a scheduler's config."""
    flags = {
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
        "use_lu_lambdas": "log_snr",
        "use_flow_sigmas": "trailing",
    }
    chosen = next((name for flag, name in flags.items() if config.get(flag)), None)
    options: Options = {"spacing": chosen or config.get("timestep_spacing", default)}
    if config.get("steps_offset"):
        options["offset"] = config["steps_offset"]
    if config.get("final_sigmas_type", "zero") != "zero":
        options["final"] = config["final_sigmas_type"]
    return options


def _first_time(config: Config, to_one: bool) -> Options:
    """Whether the last step ends at time 0, where a little noise is left; ``to_one`` is the class's default.

    Without an offset the grid is at time 0 already, and such a step would lead nowhere.
    """
    if config.get("set_alpha_to_one", to_one) or not config.get("steps_offset"):
        return {}
    return {"final": "sigma_min", "closed": False}


def _solver_grid(config: Config) -> Options:
    """Of the solvers that leave the last of ``steps + 1`` even times out when they go to sigma = 0 instead."""
    options = _grid(config, "linspace")
    counted = options["spacing"] in ("linspace", "leading") and "final" not in options
    return {**options, "closed": True} if counted else options


def _multistep(config: Config) -> Alias:
    kind, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    options = _solver_grid(config)
    if order == 1:
        # The first-order methods are DDIM's step, SDE-DPM-Solver++ with all noise drawn anew.
        if kind == "sde-dpmsolver":
            raise _Missing
        return "ddim", {**options, "eta": 1.0 if kind.startswith("sde") else 0.0}
    if order == 2:
        options["kind"] = config.get("solver_type", "midpoint")
    elif kind == "sde-dpmsolver":
        raise _Missing
    options["lower_order_final"] = config.get("lower_order_final", True)
    family = "dpmpp" if kind.endswith("++") else "dpm_solver"
    return f"{family}_{order}m{'_sde' if kind.startswith('sde') else ''}", options


def _singlestep(config: Config) -> Alias:
    kind, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    if kind == "sde-dpmsolver":
        raise _Missing
    options = {
        **_solver_grid(config),
        "lower_order_final": config.get("lower_order_final", False),
        "kind": config.get("solver_type", "midpoint"),
    }
    if order == 1:
        return _multistep(config)
    if kind.startswith("sde"):
        options["eta"] = 1.0
    return f"{'dpmpp' if kind.endswith('++') else 'dpm_solver'}_{order}s", options


def _deis(config: Config) -> Alias:
    options = {**_grid(config, "linspace"), "final": "sigma_min", "variable": "log_rho"}
    options["lower_order_final"] = config.get("lower_order_final", True)
    return "deis", {**options, "order": config.get("solver_order", 2)}


def _unipc(config: Config) -> Alias:
    return "unipc", {
        **_solver_grid(config),
        "order": config.get("solver_order", 2),
        "variant": config.get("solver_type", "bh2"),
        "predict": "x0" if config.get("predict_x0", True) else "noise",
        "lower_order_final": config.get("lower_order_final", True),
        "disable_corrector": tuple(config.get("disable_corrector", ())),
    }


def _sa_solver(config: Config) -> Alias:
    data = config.get("algorithm_type", "data_prediction") == "data_prediction"
    return "sa_solver", {
        **_grid(config, "linspace"),
        "final": "sigma_min",
        "predictor_order": config.get("predictor_order", 2),
        "corrector_order": config.get("corrector_order", 2),
        "expands": "data" if data else "noise",
        "lower_order_final": config.get("lower_order_final", True),
    }


def _edm_multistep(config: Config) -> Alias:
    """EDM schedulers name their spacing ``sigma_schedule``."""
    return _multistep({"timestep_spacing": config.get("sigma_schedule", "karras"), **config})


def _plain(name: str, default: str) -> Callable[[Config], Alias]:
    return lambda config: (name, _grid(config, default))


def _distilled(name: str) -> Callable[[Config], Alias]:
    return lambda config: (name, {"original_steps": config.get("original_inference_steps", 50)})


#: Class name → the sampler that a scheduler of that class and config is.
_DIFFUSERS: dict[str, Callable[[Config], Alias]] = {
    "DDPMScheduler": lambda c: (
        "ddpm",
        {**_grid(c, "leading"), "variance": c.get("variance_type", "fixed_small")},
    ),
    "DDIMScheduler": lambda c: ("ddim", {**_grid(c, "leading"), **_first_time(c, True)}),
    "PNDMScheduler": lambda c: (
        "plms",
        {**_grid(c, "leading"), **_first_time(c, False), "skip_prk_steps": c.get("skip_prk_steps", False)},
    ),
    "IPNDMScheduler": lambda c: ("ipndm", {}),
    "EulerDiscreteScheduler": _plain("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": _plain("euler_ancestral", "linspace"),
    "HeunDiscreteScheduler": _plain("heun", "linspace"),
    "LMSDiscreteScheduler": _plain("lms", "linspace"),
    "KDPM2DiscreteScheduler": _plain("dpm2", "linspace"),
    "KDPM2AncestralDiscreteScheduler": _plain("dpm2_ancestral", "linspace"),
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "DPMSolverSDEScheduler": _plain("dpmpp_sde", "linspace"),
    "DEISMultistepScheduler": _deis,
    "UniPCMultistepScheduler": _unipc,
    "SASolverScheduler": _sa_solver,
    "LCMScheduler": _distilled("lcm"),
    "TCDScheduler": _distilled("tcd"),
    "EDMEulerScheduler": lambda c: ("euler", _grid({**c, "timestep_spacing": "karras"}, "karras")),
    "EDMDPMSolverMultistepScheduler": _edm_multistep,
    "FlowMatchEulerDiscreteScheduler": lambda c: (
        "flow_euler",
        {**_grid(c, "trailing"), "stochastic_sampling": c.get("stochastic_sampling", False)},
    ),
    "FlowMatchHeunDiscreteScheduler": lambda c: ("flow_heun", {}),
}


def from_diffusers(scheduler: str, config: Config | None = None) -> Alias:
    """(our sampler's name, its options) for a scheduler of diffusers.

    What a scheduler's config says about the model (betas, prediction, thresholding, shift) is no option of a
    sampler: it belongs to the schedule, the prediction and the guidance.

    Args:
        scheduler: class name, e.g. ``"DPMSolverMultistepScheduler"``.
        config: its config; what is missing has the class's default.

    Raises:
        KitError: a class, or an algorithm and order of it, that none of our samplers stands for.
    """
    if scheduler not in _DIFFUSERS:
        raise KitError(unknown("diffusers scheduler", scheduler, _DIFFUSERS))
    config = config or {}
    try:
        return _DIFFUSERS[scheduler](config)
    except _Missing:
        told = ", ".join(
            f"{key}={config[key]!r}" for key in ("algorithm_type", "solver_order") if key in config
        )
        raise KitError(f"no sampler here is {scheduler} with {told}; sde-dpmsolver++ has one") from None


#: Every further name → (our name, the options it implies).
ALIASES: dict[str, Alias] = {
    **{f"sample_{name}": alias for name, alias in _K_DIFFUSION.items()},
    **{name: alias for name, alias in _K_DIFFUSION.items() if name != alias[0]},
    **_COMFYUI,
    **{f"sample_{name}": alias for name, alias in _COMFYUI.items() if not name.endswith("_gpu")},
    **_a1111(),
    **{name: from_diffusers(name) for name in _DIFFUSERS},
}

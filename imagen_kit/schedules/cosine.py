"""Cosine schedule: continuous (Imagen, simple diffusion) and discrete (improved DDPM, IF)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_kit.schedules import register
from imagen_kit.schedules.base import (
    UNIT_RATIOS,
    DiscreteSchedule,
    Schedule,
    log_alpha2_of_betas,
    positive,
    time_range,
    training_steps,
)

#: Nichol & Dhariwal 2021, eq. 17 and the text below it.
OFFSET, MAX_BETA = 0.008, 0.999


class ContinuousCosine(Schedule):
    """alpha = cos(pi t / 2) on [0, 1], with sigma / alpha multiplied by ``shift``; see ``cosine``."""

    name = "cosine"
    time_scale = 1000.0
    ratio_range = UNIT_RATIOS

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3, t_max: float = 1 - 1e-3):
        self.shift = positive("shift", shift)
        self.t_min, self.t_max = time_range(t_min, t_max)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin of the complement is exactly 0 at t = 1, where cos(pi/2) is not.
        cos, sin = torch.sin((1 - t) * (math.pi / 2)), self.shift * torch.sin(t * (math.pi / 2))
        norm = torch.hypot(cos, sin)
        return cos / norm, sin / norm

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr / 2).exp() / self.shift) * (2 / math.pi)


@register("cosine", time="[0, 1], or 0 … T-1 with `timesteps`")
def cosine(
    timesteps: int | None = None,
    shift: float = 1.0,
    zero_terminal_snr: bool = False,
    t_min: float = 1e-3,
    t_max: float = 1 - 1e-3,
) -> Schedule:
    """Cosine schedule, continuous on [0, 1] or with ``timesteps`` discrete steps.

    Continuous: alpha = cos(pi t / 2) (Imagen; Salimans & Ho 2022). Discrete: betas from the squared cosine
    with offset 0.008, at most 0.999 (Nichol & Dhariwal 2021, eq. 17; ``squaredcos_cap_v2`` elsewhere; IF).

    Args:
        timesteps: T for the discrete schedule, None for the continuous one.
        shift: factor on sigma / alpha, i.e. log-SNR - 2 log(shift); resolution / 64 in simple diffusion
            (Hoogeboom et al. 2023, eq. 5).
        zero_terminal_snr: rescale the discrete schedule to alpha(T-1) = 0 (Lin et al. 2023).
        t_min, t_max: ends of the sampling grid of the continuous schedule.
    """
    if timesteps is None:
        return ContinuousCosine(shift, t_min, 1.0 if zero_terminal_snr else t_max)
    grid = torch.arange(training_steps(timesteps) + 1, dtype=torch.float64) / timesteps
    alpha2 = torch.cos((grid + OFFSET) / (1 + OFFSET) * (math.pi / 2)) ** 2
    betas = (1 - alpha2[1:] / alpha2[:-1]).clamp(max=MAX_BETA)
    return DiscreteSchedule(
        log_alpha2_of_betas(betas), zero_terminal_snr=zero_terminal_snr, shift=shift, name="cosine"
    )

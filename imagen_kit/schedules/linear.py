"""Discrete schedules whose betas rise linearly (DDPM), or whose square roots do (latent diffusion)."""

from __future__ import annotations

import torch

from imagen_kit.errors import KitError
from imagen_kit.schedules import register
from imagen_kit.schedules.base import DiscreteSchedule, log_alpha2_of_betas, training_steps


@register("linear", time="0 … T-1")
class Linear(DiscreteSchedule):
    """Betas rise linearly from ``beta_start`` to ``beta_end`` (Ho et al. 2020, section 4).

    Args:
        beta_start, beta_end: first and last beta, in (0, 1).
        timesteps: T, the number of training steps.
        zero_terminal_snr: rescale to alpha(T-1) = 0 (Lin et al. 2023).
    """

    def __init__(
        self,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        check_betas(beta_start, beta_end)
        betas = torch.linspace(beta_start, beta_end, training_steps(timesteps), dtype=torch.float64)
        super().__init__(log_alpha2_of_betas(betas), zero_terminal_snr=zero_terminal_snr, name="linear")


@register("scaled_linear", time="0 … T-1")
class ScaledLinear(DiscreteSchedule):
    """Square roots of the betas rise linearly (Rombach et al. 2022; Stable Diffusion, SDXL).

    Args:
        beta_start, beta_end: first and last beta, in (0, 1).
        timesteps: T, the number of training steps.
        zero_terminal_snr: rescale to alpha(T-1) = 0 (Lin et al. 2023).
    """

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        check_betas(beta_start, beta_end)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, training_steps(timesteps), dtype=torch.float64)
        super().__init__(
            log_alpha2_of_betas(roots**2), zero_terminal_snr=zero_terminal_snr, name="scaled_linear"
        )


def check_betas(beta_start: float, beta_end: float) -> None:
    """KitError unless 0 < beta_start <= beta_end < 1."""
    if not 0 < beta_start <= beta_end < 1:
        raise KitError(
            f"schedule options must obey 0 < beta_start <= beta_end < 1, not beta_start={beta_start!r}, "
            f"beta_end={beta_end!r}"
        )

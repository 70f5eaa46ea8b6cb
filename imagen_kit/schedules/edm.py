"""EDM's variance-exploding schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.schedules import register
from imagen_kit.schedules.base import Schedule, positive


@register("edm", time="sigma")
class Edm(Schedule):
    """alpha = 1, sigma = t: time is the noise level (Karras et al. 2022, Table 1).

    Args:
        sigma_min, sigma_max: ends of the sampling grid.
        sigma_data: standard deviation of the data, which EDM's preconditioning needs.
    """

    name = "edm"
    domain = (0.0, math.inf)

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5):
        self.t_min, self.t_max = positive("sigma_min", sigma_min), positive("sigma_max", sigma_max)
        self.sigma_data = positive("sigma_data", sigma_data)
        if self.t_min >= self.t_max:
            raise KitError(
                f"schedule options must obey sigma_min < sigma_max, not {sigma_min!r} and {sigma_max!r}"
            )

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()

"""Sigmoid schedules: discrete betas, and the continuous one of Jabri et al. 2022."""

from __future__ import annotations

import torch
from torch import Tensor

from imagen_kit.errors import KitError
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
from imagen_kit.schedules.linear import check_betas


class ContinuousSigmoid(Schedule):
    """alpha² falls from 1 to 0 on [0, 1] along a piece of the logistic curve; see ``sigmoid``."""

    name = "sigmoid"
    time_scale = 1000.0
    ratio_range = UNIT_RATIOS

    def __init__(
        self,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        t_min: float = 1e-3,
        t_max: float = 1 - 1e-3,
    ):
        if not start < end:
            raise KitError(f"schedule options must obey start < end, not start={start!r}, end={end!r}")
        self.tau = positive("tau", tau)
        self.start, self.end = float(start), float(end)
        self.t_min, self.t_max = time_range(t_min, t_max)
        self._v = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64)).tolist()

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        v_start, v_end = self._v
        curve = torch.sigmoid((t * (self.end - self.start) + self.start) / self.tau)
        gamma = ((v_end - curve) / (v_end - v_start)).clamp(0, 1)
        return gamma.sqrt(), ((curve - v_start) / (v_end - v_start)).clamp(0, 1).sqrt()

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        v_start, v_end = self._v
        curve = v_end - torch.sigmoid(log_snr) * (v_end - v_start)
        return ((torch.logit(curve) * self.tau - self.start) / (self.end - self.start)).clamp(0, 1)


@register("sigmoid", time="0 … T-1, or [0, 1] with timesteps=None")
def sigmoid(
    timesteps: int | None = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
) -> Schedule:
    """Sigmoid schedule, with discrete betas or continuous on [0, 1].

    Discrete: betas follow the logistic curve over [-6, 6] from ``beta_start`` to ``beta_end`` (Xu et al.
    2022, GeoDiff). Continuous (``timesteps=None``): alpha² itself does, from ``start`` to ``end`` with
    temperature ``tau`` (Jabri, Fleet & Chen 2022, section 3.3; Chen 2023, Algorithm 1).
    """
    if timesteps is None:
        return ContinuousSigmoid(start, end, tau, t_max=1.0 if zero_terminal_snr else 1 - 1e-3)
    check_betas(beta_start, beta_end)
    curve = torch.sigmoid(torch.linspace(-6, 6, training_steps(timesteps), dtype=torch.float64))
    betas = curve * (beta_end - beta_start) + beta_start
    return DiscreteSchedule(log_alpha2_of_betas(betas), zero_terminal_snr=zero_terminal_snr, name="sigmoid")

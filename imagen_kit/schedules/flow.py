"""Straight-line (rectified flow, flow matching) schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from imagen_kit.schedules import register
from imagen_kit.schedules.base import UNIT_RATIOS, Number, Schedule, positive, time_range


@register("flow", time="[0, 1]")
class Flow(Schedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022).

    ``shift`` does not change alpha(t) and sigma(t), since the network is told t itself. It moves where times
    are
    put: ``shift_time`` sends a uniform time u to s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23), and the
    sampling grids ``linspace``, ``leading`` and ``trailing`` as well as training draw their times through it.

    Args:
        shift: s, larger = more time at high noise; 1 = none; 3 for SD3 at 1024 pixels.
        t_min, t_max: ends of the sampling grid. The noisy end stays short of 1, where alpha is 0 and solvers
            that divide by it do not fit.
    """

    name = "flow"
    time_scale = 1000.0
    ratio_range = UNIT_RATIOS

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3, t_max: float = 1 - 1e-3):
        self.shift = positive("shift", shift)
        self.t_min, self.t_max = time_range(t_min, t_max)

    def shift_time(self, t: Number) -> Number:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

"""What every noise schedule offers: alpha(t), sigma(t), their log-SNR and its inverse, in float64.

A schedule's time ``t`` is the number the network was trained to be told (``0 … T-1`` for discrete betas,
``[0, 1]`` for flow and the continuous schedules, sigma for EDM) and x_t = alpha(t) x0 + sigma(t) noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

from imagen_kit.errors import KitError

Number = TypeVar("Number", float, Tensor)


def as_double(value: float | Tensor) -> Tensor:
    """``value`` as a float64 tensor, where it lies (the CPU for devices that have no float64)."""
    if isinstance(value, Tensor):
        if value.device.type == "mps":
            value = value.cpu()
        return value.double()
    return torch.tensor(float(value), dtype=torch.float64)


class Schedule:
    """Base of all schedules. Subclasses give ``_alpha_sigma`` and ``_t_of_log_snr`` on float64 tensors.

    Attributes:
        name: what messages call it.
        t_min, t_max: native times of the clean and of the noisy end of the usable grid.
        domain: all times at which the schedule is defined.
        time_scale: factor a network's sinusoidal time embedding multiplies ``t`` with.
        discrete: number of training steps T, or None for continuous time.
        ratio_range: limits on sigma / alpha that grids spaced in sigma / alpha keep to. Schedules on [0, 1]
            have no
            natural end: beyond these, steps change nothing a picture shows, and there would be many.
    """

    name: str = "custom"
    t_min: float
    t_max: float
    domain: tuple[float, float] = (0.0, 1.0)
    time_scale: float = 1.0
    discrete: int | None = None
    ratio_range: tuple[float, float] = (0.0, math.inf)

    # ---- given by subclasses -------------------------------------------------------------------------------

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    # ---- offered to everybody ------------------------------------------------------------------------------

    @overload
    def alpha_sigma(self, t: float) -> tuple[float, float]: ...
    @overload
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def alpha_sigma(self, t: float | Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t): floats for a float, float64 tensors of t's shape and device for a tensor."""
        alpha, sigma = self._alpha_sigma(as_double(t))
        return (alpha, sigma) if isinstance(t, Tensor) else (alpha.item(), sigma.item())

    def log_snr(self, t: Number) -> Number:
        """log(alpha² / sigma²); -inf where alpha is 0, +inf where sigma is 0."""
        return _like(t, self._log_snr)

    def t_of_log_snr(self, log_snr: Number) -> Number:
        """The native (real-valued) time with this log-SNR; outside the schedule's range its nearest end."""
        return _like(log_snr, self._t_of_log_snr)

    def t_of_ratio(self, ratio: Number) -> Number:
        """The native time where sigma / alpha equals ``ratio`` (the sigma of variance-exploding samplers)."""
        return _like(ratio, lambda r: self._t_of_log_snr(-2 * r.log()))

    def shift_time(self, t: Number) -> Number:
        """Where a uniformly spread time (of a grid, of training) goes; itself unless the schedule shifts."""
        return t

    def prior_std(self, t: float) -> float:
        """Standard deviation of the Gaussian that stands for x at the noisy time ``t`` when sampling starts
        there.

        1 for variance-preserving schedules (data of unit variance), sigma(t) for the others.
        """
        alpha, sigma = self.alpha_sigma(t)
        preserving = abs(alpha * alpha + sigma * sigma - 1) < 1e-9
        return 1.0 if preserving else sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise.

        Args:
            x0, noise: (b, ...) of the same shape.
            t: (b,) native times.

        Returns:
            (b, ...) in x0's dtype. Coefficients are computed in float64 and never applied below float32
            (in bf16 sigma near the clean end would round away).
        """
        alpha, sigma = self.alpha_sigma(t)
        shape = (-1,) + (1,) * (x0.ndim - 1)
        work = torch.promote_types(x0.dtype, torch.float32)
        a, s = (c.to(device=x0.device, dtype=work).view(shape) for c in (alpha, sigma))
        return (a * x0 + s * noise).to(x0.dtype)


class DiscreteSchedule(Schedule):
    """A schedule given by T betas, or T values of alpha², extended to real-valued time.

    Between integers log-SNR is interpolated linearly; in the last interval of a schedule with zero terminal
    SNR, where log-SNR is -inf at the end, alpha is.

    Args:
        log_alpha2: (T,) log of the product of (1 - beta), decreasing.
        zero_terminal_snr: rescale so that alpha(T-1) is exactly 0 (Lin et al. 2023, Algorithm 1).
        shift: multiplies sigma / alpha (log-SNR - 2 log shift), as for higher resolutions in simple
            diffusion.
    """

    def __init__(
        self,
        log_alpha2: Tensor,
        *,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
        name: str = "custom",
    ):
        self.name = name
        log_alpha2 = log_alpha2.double().cpu()
        if shift != 1.0:
            positive("shift", shift)
            shifted = _log_snr_of(log_alpha2) - 2 * math.log(shift)
            log_alpha2 = torch.nn.functional.logsigmoid(shifted)
        if zero_terminal_snr:
            alpha = (log_alpha2 / 2).exp()
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            log_alpha2 = 2 * alpha.log()
        self.discrete = len(log_alpha2)
        self.t_min, self.t_max = self.domain = (0.0, float(self.discrete - 1))
        self._tables = {torch.device("cpu"): _log_snr_of(log_alpha2)}

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) alpha² at the integer times."""
        return torch.sigmoid(self._table(torch.device("cpu")))

    def _table(self, device: torch.device) -> Tensor:
        # One copy a device, so that a training step on an accelerator does not wait for a transfer.
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(t.device)
        low = t.floor().clamp(0, len(table) - 2).long()
        part = (t - low).clamp(0, 1)
        left, right = table[low], table[low + 1]
        # 0 · (-inf) is nan, so the interval that ends at -inf takes the other branch with a finite stand-in.
        ends = right.isinf()
        log_snr = torch.lerp(left, torch.where(ends, left, right), part)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        alpha = torch.where(ends, alpha * (1 - part), alpha)
        return alpha, torch.where(ends, (1 - alpha * alpha).sqrt(), sigma)

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._table(log_snr.device)
        rising = table.flip(0)
        high = len(table) - 1 - torch.searchsorted(rising, log_snr.contiguous(), right=True)
        low = high.clamp(0, len(table) - 2)
        left, right = table[low], table[low + 1]
        part = ((left - log_snr) / (left - right)).clamp(0, 1)
        of_alpha = (1 - (torch.sigmoid(log_snr) / torch.sigmoid(left)).sqrt()).clamp(0, 1)
        return low + torch.where(right.isinf(), of_alpha, part)


#: ``ratio_range`` of schedules on [0, 1]. Above 250 even the mean brightness of a 128-pixel picture drowns in
#: the noise but for a few per cent; below 0.02 what is left to remove is a fiftieth of the contrast.
UNIT_RATIOS = (0.02, 250.0)


def log_alpha2_of_betas(betas: Tensor) -> Tensor:
    """(T,) log alpha² = Σ log(1 - beta), summed in logs so that sigma near the clean end keeps its digits."""
    return torch.log1p(-betas.double()).cumsum(0)


def positive(name: str, value: float) -> float:
    """``value``, when it is a positive number; KitError otherwise."""
    if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
        raise KitError(f"schedule option {name!r} must be a positive number, not {value!r}")
    return float(value)


def training_steps(timesteps: int) -> int:
    """``timesteps``, when it is a whole number of at least 2; KitError otherwise."""
    if not isinstance(timesteps, int) or isinstance(timesteps, bool) or timesteps < 2:
        raise KitError(f"schedule option 'timesteps' must be a whole number of at least 2, not {timesteps!r}")
    return timesteps


def time_range(t_min: float, t_max: float) -> tuple[float, float]:
    """A usable part of [0, 1]; KitError otherwise."""
    if not 0 <= t_min < t_max <= 1:
        raise KitError(
            f"schedule options must obey 0 <= t_min < t_max <= 1, not t_min={t_min!r}, t_max={t_max!r}"
        )
    return float(t_min), float(t_max)


def _log_snr_of(log_alpha2: Tensor) -> Tensor:
    return log_alpha2 - torch.log(-torch.expm1(log_alpha2))


def _like(value: Number, function: Callable[[Tensor], Tensor]) -> Number:
    out = function(as_double(value))
    return out if isinstance(value, Tensor) else out.item()

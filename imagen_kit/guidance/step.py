"""Where in a sampling run a call of the network takes place.

Axes: b batch, n grid points from the noisy start to the end of sampling.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError

AXES = ("sigma", "log_snr", "t", "progress")
Times = tuple[float, ...] | Tensor


@dataclass(frozen=True)
class Step:
    """Where in the diffusion a call takes place.

    Attributes:
        t, alpha, sigma: floats; or tensors (b or 1, 1, 1, 1), the latter two in float64, when the caller
            passed a tensor t.
        times: the run's grid of native times: n numbers, noisiest first, or a tensor (b, n) where samples
            have grids of their own; None outside a run.
        where: (b or 1, 1, 1, 1) bool, the samples for which the strategy that is asked acts; None = all.
    """

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor
    times: Times | None = None
    where: Tensor | None = None

    @property
    def coefficients(self) -> tuple[Any, Any, Any]:
        """t, alpha, sigma: all floats or all tensors, which no annotation can say."""
        return self.t, self.alpha, self.sigma

    @property
    def place(self) -> float | Tensor:
        """Steps taken before this call: i at the grid's time i, linear in t between the grid's times.

        A function of the time alone, so the stages of a solver's step see it move on; counting calls would
        not know a second stage from the next step.

        Raises:
            KitError: the grid is not known.
        """
        if self.times is None:
            raise KitError(
                "guidance that changes with the steps needs the grid of the run: "
                "denoise = denoise.begin(times=[...]), as samplers do"
            )
        if isinstance(self.t, Tensor) or isinstance(self.times, Tensor):
            return _places(self.t, self.times)
        descending = self.times
        # native times fall from the noisy start; a time above the start is the start
        i = bisect.bisect_right(descending, -self.t, key=lambda time: -time) - 1
        if i < 0 or i >= len(descending) - 1:
            return float(min(max(i, 0), len(descending) - 1))
        return i + (descending[i] - self.t) / (descending[i] - descending[i + 1])

    @property
    def progress(self) -> float | Tensor:
        """``place`` as a fraction of all steps: 0 at the noisy start, 1 at the end. KitError as there."""
        place = self.place
        assert self.times is not None
        count = self.times.shape[-1] if isinstance(self.times, Tensor) else len(self.times)
        return place / max(count - 1, 1)

    def on(self, axis: str) -> float | Tensor:
        """The position on one of ``AXES``; sigma is the noise-to-signal ratio sigma/alpha, as in EDM."""
        if axis == "t":
            return self.t
        if axis == "progress":
            return self.progress
        alpha, sigma = self.alpha, self.sigma
        if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
            ratio = torch.as_tensor(sigma / alpha)
            return ratio if axis == "sigma" else -2 * ratio.log()
        ratio_ = sigma / alpha if alpha else math.inf
        if axis == "sigma":
            return ratio_
        return -2 * math.log(ratio_) if ratio_ else math.inf


def _places(t: float | Tensor, times: Times) -> Tensor:
    """``place`` for tensors, in t's shape: Σ over the grid's steps of the part of each that lies before t."""
    like = t if isinstance(t, Tensor) else times
    assert isinstance(like, Tensor)
    shape = (-1, *(1,) * (t.ndim - 1)) if isinstance(t, Tensor) else (-1, 1, 1, 1)
    grid = torch.as_tensor(times, dtype=torch.float64).to(like.device, non_blocking=True)
    grid = grid.reshape(-1, grid.shape[-1])
    at = t.reshape(-1, 1).double() if isinstance(t, Tensor) else t
    # tensor times have usually passed through float32: a millionth apart is the same time
    grid = torch.where((grid - at).abs() <= 1e-6 * grid.abs(), at, grid)
    begin, end = grid[:, :-1], grid[:, 1:]
    part = (begin - at).clamp_min(0) / (begin - end).clamp_min(torch.finfo(torch.float64).tiny)
    return part.clamp_max(1).sum(-1).reshape(shape)

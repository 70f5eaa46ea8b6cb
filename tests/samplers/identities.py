"""Comparing samplers with one another: the same start, network and noise."""

from __future__ import annotations

from typing import Any

import torch
from sampler_oracles import mixture_denoiser
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.schedules.base import Schedule

#: Exact arithmetic says equal; coefficients computed along two ways differ by rounding, and states grow to 1e2.
ROUNDING = 1e-10


def sample(name: str, schedule: Schedule | str = "cosine", steps: int = 7, **options: Any) -> Tensor:
    """A sample (6, 2) of the mixture by a sampler, on one grid for all samplers, from one start and noise."""
    schedule = schedules.create(schedule) if isinstance(schedule, str) else schedule
    options = {"spacing": "log_snr", **options}
    sampler = samplers.create(name, **options)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    noises = iter(torch.randn(60, 6, 2, generator=generator, dtype=torch.float64))
    start = x * schedule.prior_std(sampler.points(schedule, steps)[0].t)
    return sampler.sample(mixture_denoiser(schedule), start, schedule, steps, noise=noises.__next__)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    return torch.allclose(a, b, rtol=0, atol=ROUNDING)

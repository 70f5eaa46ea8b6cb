"""Networks for the tests of guidance: cheap, not linear, and they count."""

from __future__ import annotations

import torch

from imagen_kit import denoise_fn, schedules

FLOW = schedules.create("flow")


class Counter:
    """network(x, t, cond) = tanh(x·cond) + t·x, elementwise; ``sizes`` holds the samples of every call."""

    def __init__(self, strength: float = 1.0):
        self.sizes: list[int] = []
        self.strength = strength

    def __call__(self, x, t, cond):
        self.sizes.append(len(x))
        return torch.tanh(self.strength * x * cond) + t.reshape(-1, 1, 1, 1).to(x.dtype) * x


def pictures(count: int, batch: int = 2, seed: int = 1) -> list[torch.Tensor]:
    """``count`` tensors (batch, 3, 4, 4) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def answers(network, x, t, *conds):
    """The network's raw answers to every conditioning."""
    return [network(x, torch.full((len(x),), t), cond) for cond in conds]


def guided(network, prediction, strategy, x, t, schedule=FLOW, begin=None, **options):
    """x0 of one call; ``begin`` holds arguments of ``Denoise.begin``."""
    denoise = denoise_fn(network, schedule, prediction, guidance=strategy, **options)
    return (denoise if begin is None else denoise.begin(**begin))(x, t)


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """(b,) as (b, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)

"""Heun's method in sigma / alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ddim_step, noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.tableau import Form


@register("heun", order=2, stochastic=False, evaluations="2 steps - 1 (2 steps with final='sigma_min')")
@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """Heun's method on the probability-flow ODE in sigma / alpha (Karras et al. 2022, Algorithm 1).

    Two evaluations a step, one in a step to sigma = 0. It needs alpha > 0 at the start.
    """

    name: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    default_steps: ClassVar[int] = 10

    spacing: str = "log_snr"

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            slope = noise_in(x, x0, now)
            euler = ddim_step(x, x0, now, then)
            if then.sigma > 0:
                slope = (slope + noise_in(euler, run.denoise(euler, then), then)) / 2
                x = run.step(then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope))
            else:
                x = run.step(euler)
        return x

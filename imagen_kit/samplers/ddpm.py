"""DDPM: ancestral sampling with a fixed variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.tableau import Form

VARIANCES = {"fixed_small": 0.0, "fixed_large": 1.0}


@register("ddpm", order=1, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Ddpm(Sampler):
    """Ancestral sampling of Ho et al. 2020 (Algorithm 2, eq. 6-7), on any grid and schedule.

    Args:
        variance: log-interpolation between the posterior's variance (0, or "fixed_small") and that of the
            forward
            step, beta (1, or "fixed_large"); numbers between are the gamma of Imagen, section E.
    """

    name: ClassVar[str] = "ddpm"
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 250

    variance: str | float = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.variance, str):
            if self.variance not in VARIANCES:
                raise KitError(
                    f"sampler 'ddpm': option 'variance' must be {' or '.join(map(repr, VARIANCES))} "
                    f"or a number from 0 to 1, not {self.variance!r}"
                )
        else:
            self._range("variance", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        gamma = VARIANCES[self.variance] if isinstance(self.variance, str) else float(self.variance)
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            forward = now.alpha / then.alpha
            beta = now.sigma**2 - (forward * then.sigma) ** 2
            small = beta * (then.sigma / now.sigma) ** 2
            mean = forward * (then.sigma / now.sigma) ** 2 * x + then.alpha * beta / now.sigma**2 * x0
            # The last step to the clean end draws nothing (Algorithm 2, line 3), whatever the variance.
            variance = beta**gamma * small ** (1 - gamma) if then.sigma > 0 else 0.0
            x = run.step(mean + variance**0.5 * run.noise())
        return x

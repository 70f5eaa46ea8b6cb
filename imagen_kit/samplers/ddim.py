"""DDIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ancestral_step
from imagen_kit.samplers.base import Run
from imagen_kit.samplers.renoise import Renoising
from imagen_kit.samplers.tableau import Form


@register("ddim", order=1, stochastic="eta > 0", evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Ddim(Renoising):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    Args:
        eta: 0 deterministic, 1 as noisy as DDPM with its small variance, between in proportion.
    """

    name: ClassVar[str] = "ddim"

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0, source = self.predict(x, now, run)
            x = run.step(ancestral_step(x, x0, now, then, self.eta, run, source))
        return x

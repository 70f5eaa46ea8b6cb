"""DPM-Solver++ on the reverse SDE: the single-step "DPM++ SDE" and the three-point multistep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ancestral_step, noise_in, split
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.dpm_multistep import Multistep
from imagen_kit.samplers.exponential import KINDS, Evaluation, data_step, expansion
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

CURVATURES = ("published", "exact")


@register("dpmpp_sde", order=2, stochastic=True, evaluations="2 steps - 1 (2 steps with 'sigma_min')")
@dataclass(frozen=True, kw_only=True)
class DpmppSde(Sampler):
    """SDE-DPM-Solver++(2S) with its stage inside the step (Lu et al. 2022b; k-diffusion's "DPM++ SDE").

    The stage s lies at lambda + r h. With the ancestral step a(x, x0 -> then) = alpha' x0 + down noise(x) +
    up n:

        x_s = a(x, x0 -> s),   x' = a(x, (1 - 1/(2r)) x0 + 1/(2r) x0(x_s) -> then).

    Both noises belong to one path: the step's is the part up to the stage and a fresh part after it, weighed
    as the SDE's solution weighs them, so that refining the grid along a path converges. Two noises a step.

    Args:
        eta: share of the noise drawn anew, as in ``euler_ancestral``: 0 is DPM-Solver++(2S), 1 the paper's
            SDE.
        r: where in the step its stage lies, in lambda.
    """

    name: ClassVar[str] = "dpmpp_sde"
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 10

    spacing: str = "log_snr"
    eta: float = 1.0
    r: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, 1.0)
        self._range("r", 0.0, 1.0, open_low=True)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            x0 = run.denoise(x, now)
            if then.sigma == 0 or now.alpha == 0:  # an infinitely long step has no stage inside
                x = run.step(ancestral_step(x, x0, now, then, self.eta, run))
                continue
            stage = then if self.r == 1 else run.point(now.lam + self.r * (then.lam - now.lam))
            early = run.noise()
            inner = run.denoise(self.step(x, x0, now, stage, early), stage)
            mixed = x0 + (inner - x0) / (2 * self.r)
            x = run.step(self.step(x, mixed, now, then, self.along(now, stage, then, early, run)))
        return x

    def step(self, x: Form, x0: Form, now: Point, then: Point, noise: Form) -> Form:
        """``ancestral_step`` with a given noise."""
        down, up = split(now, then, self.eta)
        return then.alpha * x0 + down.sigma * noise_in(x, x0, now) + then.sigma * up * noise

    def along(self, now: Point, stage: Point, then: Point, early: Form, run: Run) -> Form:
        """The unit noise of the whole step, of which ``early`` is the part up to the stage."""
        (_, up), (down, late) = split(now, stage, self.eta), split(stage, then, self.eta)
        if late == 0:  # no noise at all, or the stage is the end of the step
            return early
        weight = up * down.sigma / then.sigma  # what the step from the stage keeps of its noise
        return (weight * early + late * run.noise()) / math.hypot(weight, late)


@register("dpmpp_3m_sde", order="2 (3 with curvature='exact')", stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp3mSde(Multistep):
    """SDE-DPM-Solver++(3M): three-point multistep on the reverse SDE (k-diffusion; Lu et al. 2022b, eq. 19).

    x' = sigma'/sigma e^(-eta h) x + alpha' Σ psi_k((1 + eta) h) D_k + sigma' sqrt(1 - e^(-2 eta h)) n, k = 1, 2, 3.

    Args:
        eta: strength of the noise; 0 is DPM-Solver++(3M), 1 the paper's SDE.
        kind: the step from two answers, ``heun`` as in k-diffusion or ``midpoint``.
        curvature: ``published``: the second derivative enters at half its value, as in the published codes;
            ``exact``: at its full value; see ``dpmpp_3m``.
    """

    name: ClassVar[str] = "dpmpp_3m_sde"
    stochastic: ClassVar[bool] = True

    eta: float = 1.0
    kind: str = "heun"
    curvature: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, math.inf)
        self._choice("kind", KINDS)
        self._choice("curvature", CURVATURES)

    @property
    def order(self) -> int:  # type: ignore[override]
        return 3 if self.curvature == "exact" else 2

    @property
    def history(self) -> int:
        return 3

    def terms(self, answers: list[Evaluation], now: Point, then: Point) -> list[tuple[int, Form]]:
        """The expansion of the answers over the step."""
        terms = expansion(answers, then.lam - now.lam, self.kind)
        if self.curvature == "exact":
            return terms
        return [(k, term / 2 if k == 3 else term) for k, term in terms]

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, self.terms(answers, now, then), now, then, self.eta, run.noise())

"""DPM-Solver++ multistep: 2M, 3M and the stochastic 2M."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import KINDS, Evaluation, data_step, expansion, psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

#: Below this many steps published code lowers the order at the end (Lu et al. 2022b, section 5).
FEW_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class Multistep(Sampler):
    """One evaluation a step; the last few answers are extrapolated along lambda.

    Args:
        lower_order_final: with fewer than 15 steps, step to the end with order 1, before it with order 2. A
            step to
            sigma = 0 always has order 1: there it is x0.
    """

    spacing: str = "log_snr"
    lower_order_final: bool = True

    #: How many of the newest answers a step uses.
    history: ClassVar[int] = 2

    def step_order(self, i: int, count: int, then: Point) -> int:
        """Order of step ``i`` of ``count``: what the history allows, lowered at the end."""
        if then.sigma == 0:
            return 1
        left = count - i if self.lower_order_final and count < FEW_STEPS else count
        return min(self.history, i + 1, left)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        """The step from the newest answers, newest first; as many as the step's order."""
        raise NotImplementedError

    def solve(self, x: Form, run: Run) -> Form:
        answers: list[Evaluation] = []
        count = len(run.points) - 1
        for i, now, then in run.steps:
            answers = [(now, run.denoise(x, now)), *answers][: self.history]
            used = answers[: self.step_order(i, count, then)]
            x = run.step(self.update(x, used, now, then, run))
        return x


@register("dpmpp_2m", order=2, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2m(Multistep):
    """DPM-Solver++(2M): second-order multistep with data prediction (Lu et al. 2022b, Algorithm 2).

    Args:
        kind: how the derivative enters, ``midpoint`` as in the paper or ``heun`` (``taylor`` elsewhere).
    """

    name: ClassVar[str] = "dpmpp_2m"
    order: ClassVar[int] = 2

    kind: str = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("kind", KINDS)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, expansion(answers, then.lam - now.lam, self.kind), now, then)


@register("dpmpp_3m", order="2 (3 with curvature='exact')", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp3m(Multistep):
    """DPM-Solver++(3M): three-point multistep with data prediction (Lu et al. 2022b; their published code).

    Args:
        curvature: ``published``: the second derivative enters at half its value, as in the authors' code and
            all that
            follow it: a smaller error than 2M's, but second order in the limit. ``exact``: its full value,
                third order.
    """

    name: ClassVar[str] = "dpmpp_3m"
    history: ClassVar[int] = 3

    curvature: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("curvature", ("published", "exact"))

    @property
    def order(self) -> int:  # type: ignore[override]
        return 3 if self.curvature == "exact" else 2

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        # Published code has a two-point step of the midpoint kind below three points.
        terms = expansion(answers, then.lam - now.lam, "midpoint")
        if self.curvature == "published":
            terms = [(k, term / 2 if k == 3 else term) for k, term in terms]
        return data_step(x, terms, now, then)


@register("dpmpp_2m_sde", order=2, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2mSde(Multistep):
    """SDE-DPM-Solver++(2M): 2M on the reverse SDE (Lu et al. 2022b, eq. 19).

    With h' = (1 + eta) h the data terms are those of a step of length h'; e^(-eta h) of the noise is kept.

    Args:
        eta: strength of the noise; 0 is DPM-Solver++(2M), 1 the paper's SDE.
        kind: ``midpoint`` or ``heun``, as in ``dpmpp_2m``.
    """

    name: ClassVar[str] = "dpmpp_2m_sde"
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    eta: float = 1.0
    kind: str = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, math.inf)
        self._choice("kind", KINDS)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        if then.sigma == 0:
            return then.alpha * answers[0][1]
        h = then.lam - now.lam
        decay = self.eta * h if self.eta else 0.0  # eta = 0 also where h is infinite
        total = then.sigma / now.sigma * math.exp(-decay) * x
        for k, derivative in expansion(answers, h, self.kind):
            total = total + then.alpha * psi(k, h + decay) * derivative
        return total + then.sigma * math.sqrt(-math.expm1(-2 * decay)) * run.noise()

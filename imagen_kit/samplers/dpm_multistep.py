"""DPM-Solver and DPM-Solver++ multistep: 2M, 3M and their stochastic forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import KINDS, Evaluation, data_step, expansion, noise_step
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.renoise import Renoising
from imagen_kit.samplers.tableau import Form

#: Below this many steps published code lowers the order at the end (Lu et al. 2022b, section 5).
FEW_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class Multistep(Sampler):
    """One evaluation a step; the last few answers are extrapolated.

    Args:
        lower_order_final: with fewer than 15 steps, step to the end with order 1, before it with order 2. A
            step to sigma = 0 always has order 1 (there it is x0), unless the formula extends to it.
        orders: the order of every step, one number each, instead of these rules; the first steps still have
            no more than the answers there are.
    """

    spacing: str = "log_snr"
    lower_order_final: bool = True
    orders: Sequence[int] | None = None

    #: Whether the noise is extrapolated, or x0.
    expands_noise: ClassVar[bool] = False
    #: Whether the formula keeps its order in a step to sigma = 0.
    reaches_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orders is None:
            return
        whole = isinstance(self.orders, list | tuple) and all(type(n) is int for n in self.orders)
        if not whole or not all(1 <= n <= self.history for n in self.orders):
            raise KitError(
                f"sampler {self.name!r}: option 'orders' must be a list of whole numbers from 1 to "
                f"{self.history}, one for every step, not {self.orders!r}"
            )
        object.__setattr__(self, "orders", tuple(self.orders))

    @property
    def history(self) -> int:
        """How many of the newest answers a step uses at most."""
        return self.order

    def step_order(self, i: int, count: int, then: Point) -> int:
        """Order of step ``i`` of ``count``: what the history allows, lowered at the end."""
        if then.sigma == 0 and not self.reaches_zero:
            return 1
        if self.orders is not None:
            if len(self.orders) != count:
                raise KitError(
                    f"sampler {self.name!r}: option 'orders' has {len(self.orders)} entries for {count} steps"
                )
            return min(self.orders[i], i + 1)
        left = count - i if self.lower_order_final and count < FEW_STEPS else count
        return min(self.history, i + 1, left)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        """The step from the newest answers, newest first; as many as the step's order."""
        raise NotImplementedError

    def solve(self, x: Form, run: Run) -> Form:
        answers: list[Evaluation] = []
        count = len(run.points) - 1
        for i, now, then in run.steps:
            x0 = run.denoise(x, now)
            answer = noise_in(x, x0, now) if self.expands_noise else x0
            answers = [(now, answer), *answers][: self.history]
            used = answers[: self.step_order(i, count, then)]
            x = run.step(self.update(x, used, now, then, run))
        return x


@dataclass(frozen=True, kw_only=True)
class SecondOrder(Multistep):
    """Two-answer steps.

    Args:
        kind: how the derivative enters, ``midpoint`` as in the papers or ``heun`` (``taylor`` elsewhere).
    """

    order: ClassVar[int] = 2

    kind: str = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("kind", KINDS)

    def terms(self, answers: list[Evaluation], now: Point, then: Point) -> list[tuple[int, Form]]:
        """The expansion of the answers over the step."""
        return expansion(answers, then.lam - now.lam, self.kind)


@dataclass(frozen=True, kw_only=True)
class ThirdOrder(SecondOrder):
    """Three-answer steps, after and before two-answer ones.

    Args:
        curvature: ``published``: the second derivative enters at half its value, as in the authors' code and
            all that follow it: a smaller error than 2M's, but second order in the limit. ``exact``: its full
            value, third order.
    """

    curvature: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("curvature", ("published", "exact"))

    @property
    def order(self) -> int:  # type: ignore[override]
        return 3 if self.curvature == "exact" else 2

    @property
    def history(self) -> int:
        return 3

    def terms(self, answers: list[Evaluation], now: Point, then: Point) -> list[tuple[int, Form]]:
        terms = super().terms(answers, now, then)
        if self.curvature == "exact":
            return terms
        return [(k, term / 2 if k == 3 else term) for k, term in terms]


@register("dpmpp_2m", order=2, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2m(SecondOrder, Renoising):
    """DPM-Solver++(2M): second-order multistep with data prediction (Lu et al. 2022b, Algorithm 2)."""

    name: ClassVar[str] = "dpmpp_2m"

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, self.terms(answers, now, then), now, then)

    def solve(self, x: Form, run: Run) -> Form:
        answers: list[Evaluation] = []
        count = len(run.points) - 1
        for i, now, then in run.steps:
            x0, source = self.predict(x, now, run)
            answers = [(now, x0), *answers][:2]
            used = answers[: self.step_order(i, count, then)]
            moved = self.update(x, used, now, then, run)
            if source is not None:  # the noise kept is that in x by `source`, not by x0
                moved = moved + then.sigma * now.alpha / now.sigma * (x0 - source)
            x = run.step(moved)
        return x


@register("dpmpp_3m", order="2 (3 with curvature='exact')", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp3m(ThirdOrder):
    """DPM-Solver++(3M): three-point multistep with data prediction (Lu et al. 2022b; their published code)."""

    name: ClassVar[str] = "dpmpp_3m"

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, self.terms(answers, now, then), now, then)


@register("dpm_solver_2m", order=2, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver2m(SecondOrder):
    """DPM-Solver(2M): second-order multistep with noise prediction (Lu et al. 2022a and their code)."""

    name: ClassVar[str] = "dpm_solver_2m"
    expands_noise: ClassVar[bool] = True

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return noise_step(x, self.terms(answers, now, then), now, then)


@register("dpm_solver_3m", order="2 (3 with curvature='exact')", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver3m(ThirdOrder):
    """DPM-Solver(3M): three-point multistep with noise prediction (Lu et al. 2022a and their code)."""

    name: ClassVar[str] = "dpm_solver_3m"
    expands_noise: ClassVar[bool] = True

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return noise_step(x, self.terms(answers, now, then), now, then)


@register("dpmpp_2m_sde", order=2, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2mSde(SecondOrder):
    """SDE-DPM-Solver++(2M): 2M on the reverse SDE (Lu et al. 2022b, eq. 19).

    With h' = (1 + eta) h the data terms are those of a step of length h'; e^(-eta h) of the noise is kept.

    Args:
        eta: strength of the noise; 0 is DPM-Solver++(2M), 1 the paper's SDE.
    """

    name: ClassVar[str] = "dpmpp_2m_sde"
    stochastic: ClassVar[bool] = True

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, math.inf)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, self.terms(answers, now, then), now, then, self.eta, run.noise())


@register("dpm_solver_2m_sde", order=2, stochastic=True, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver2mSde(SecondOrder):
    """SDE-DPM-Solver(2M): 2M with noise prediction on the reverse SDE (Lu et al. 2022b).

    Args:
        eta: strength of the noise; 0 is DPM-Solver(2M), 1 the paper's SDE.
    """

    name: ClassVar[str] = "dpm_solver_2m_sde"
    stochastic: ClassVar[bool] = True
    expands_noise: ClassVar[bool] = True

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, math.inf)

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return noise_step(x, self.terms(answers, now, then), now, then, self.eta, run.noise())

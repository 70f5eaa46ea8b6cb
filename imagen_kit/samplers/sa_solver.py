"""SA-Solver: stochastic Adams predictor and corrector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import Evaluation, data_step, expansion, noise_step, psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

EXPANDS = ("data", "noise")
WEIGHTS = ("published", "exact")


@dataclass(frozen=True)
class _Step:
    """A step that has been predicted and is to be corrected: from where, with which tau, noise and order."""

    start: Form
    now: Point
    then: Point
    eta: float
    noise: Form
    order: int


@register("sa_solver", order="up to 4", stochastic=True, evaluations="steps (+ 1 with correct_last)")
@dataclass(frozen=True, kw_only=True)
class SaSolver(Sampler):
    """SA-Solver: stochastic Adams multistep, predictor and corrector (Xue et al. 2023, Algorithm 1).

    The reverse SDE with noise of strength tau(t), constant over a step, has with data prediction the solution
    (Proposition 4.2)

        x' = sigma'/sigma e^(-tau² h) x + alpha' ∫ (1 + tau²) e^((1 + tau²)(lambda - lambda')) x0 dlambda
             + sigma' sqrt(1 - e^(-2 tau² h)) n.

    The predictor integrates the polynomial through the newest answers (eq. 14), the corrector that through
    the answer at the predicted state as well, with the same noise (eq. 17). One evaluation a step: the
    answer at the predicted state serves the corrector and then, as the newest, the next predictor. The state
    at the end of a step is the predicted one.

    Args:
        tau: strength of the noise, a number from 0 (the ODE) or a function of the native time at which a
            step starts; 1 is the usual reverse SDE.
        tau_low, tau_high: noise is added only in steps that start at a sigma / alpha within these.
        predictor_order, corrector_order: 1 to 4 points; corrector_order 0 leaves the corrector out.
        expands: ``data`` (x0) or ``noise`` (the paper's appendix C; it needs alpha > 0, and its noise does
            not die away towards sigma = 0).
        weights: ``published``: two-point steps weigh the slope of x0 by (1 + tau²) h²/2 in place of the
            integral, as the authors' code does for few steps; ``exact``: the paper's integral. Same order.
        lower_order_final: lower the orders in the last steps, to 1 in the last. A step to sigma = 0 is x0.
        correct_last: evaluate at the end too and return the corrected sample, as the paper's algorithm does;
            with final='sigma_min' only.
    """

    name: ClassVar[str] = "sa_solver"
    stochastic: ClassVar[bool] = True

    spacing: str = "log_snr"
    tau: float | Callable[[float], float] = 1.0
    tau_low: float = 0.0
    tau_high: float = math.inf
    predictor_order: int = 2
    corrector_order: int = 2
    expands: str = "data"
    weights: str = "published"
    lower_order_final: bool = True
    correct_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.tau):
            self._range("tau", 0.0, math.inf)
        self._range("tau_low", 0.0, math.inf)
        if not isinstance(self.tau_high, int | float) or not self.tau_high >= self.tau_low:
            raise KitError(
                f"sampler 'sa_solver': option 'tau_high' must be at least tau_low, not {self.tau_high!r}"
            )
        for option, least in (("predictor_order", 1), ("corrector_order", 0)):
            value = getattr(self, option)
            if type(value) is not int or not least <= value <= 4:
                raise KitError(
                    f"sampler 'sa_solver': option {option!r} must be a whole number from {least} to 4, "
                    f"not {value!r}"
                )
        self._choice("expands", EXPANDS)
        self._choice("weights", WEIGHTS)
        if self.correct_last and self.final != "sigma_min":
            raise KitError("sampler 'sa_solver': option 'correct_last' needs final='sigma_min'")

    @property
    def order(self) -> int:  # type: ignore[override]
        # A corrector of c points has order c, given a predictor of order c - 1 at least.
        return min(self.corrector_order, self.predictor_order + 1) or self.predictor_order

    def solve(self, x: Form, run: Run) -> Form:
        answers: list[Evaluation] = []
        pending: _Step | None = None
        count = len(run.points) - 1
        for i, now, then in run.steps:
            x0 = run.denoise(x, now)
            if then.sigma == 0:
                x = run.step(then.alpha * x0)
                continue
            newest = self.answer(x, x0, now)
            if pending is not None:
                x = run.keep(self.correct(x, [newest, *answers], pending))
            answers = [newest, *answers][:4]
            left = count - i if self.lower_order_final else count
            order = min(self.predictor_order, i + 1, left)
            eta = self.tau_at(now) ** 2
            pending = _Step(x, now, then, eta, run.noise(), min(self.corrector_order, i + 2, left + 1))
            x = self.predict(answers[:order], pending)
            if i + 1 == count and self.correct_last:
                x = self.correct(x, [self.answer(x, run.denoise(x, then), then), *answers], pending)
            x = run.step(x)
        return x

    def answer(self, x: Form, x0: Form, at: Point) -> Evaluation:
        """The network's answer in the form that is expanded."""
        return (at, x0) if self.expands == "data" else (at, noise_in(x, x0, at))

    def tau_at(self, at: Point) -> float:
        """tau of the step that starts at a point."""
        if not self.tau_low <= at.ratio <= self.tau_high:
            return 0.0
        if not callable(self.tau):
            return float(self.tau)
        value = float(self.tau(at.t))
        if not (math.isfinite(value) and value >= 0):
            raise KitError(f"sampler 'sa_solver': tau({at.t:g}) must be a number from 0, not {value!r}")
        return value

    def predict(self, answers: list[Evaluation], step: _Step) -> Form:
        """The Adams-Bashforth step (eq. 14)."""
        return self.update(expansion(answers, step.then.lam - step.now.lam), step)

    def correct(self, predicted: Form, answers: list[Evaluation], step: _Step) -> Form:
        """The Adams-Moulton step (eq. 17), from the answer at the predicted state (first) and those before."""
        if step.order == 0:
            return predicted
        newest, start, *older = answers
        if step.order == 1 or math.isinf(step.now.lam):  # no slope over an infinitely long step
            return self.update([(1, newest[1])], step)
        nodes = [start, newest, *older][: step.order]
        return self.update(expansion(nodes, step.then.lam - step.now.lam), step)

    def update(self, terms: list[tuple[int, Form]], step: _Step) -> Form:
        """The SDE's solution over the step with the integrand expanded in ``terms``."""
        if self.expands == "noise":
            return noise_step(step.start, terms, step.now, step.then, step.eta, step.noise)
        moved = data_step(step.start, terms, step.now, step.then, step.eta, step.noise)
        if self.weights == "published" and len(terms) == 2:
            long = (1 + step.eta) * (step.then.lam - step.now.lam)
            moved = moved + step.then.alpha * (long / 2 - psi(2, long)) * terms[1][1]
        return moved

"""UniPC: predictor and corrector of one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from imagen_kit.errors import KitError, unknown
from imagen_kit.samplers import register, registry
from imagen_kit.samplers.ancestral import noise_in
from imagen_kit.samplers.base import Run
from imagen_kit.samplers.dpm_multistep import Multistep
from imagen_kit.samplers.exponential import Evaluation, combine, data_step, noise_step, psi
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

VARIANTS = ("bh1", "bh2")
PREDICTS = ("x0", "noise")
UNIP = "unip"


@dataclass(frozen=True)
class _Step:
    """A step that has been predicted and may be corrected: where from, to where, and with which answers."""

    x: Form
    answers: list[Evaluation]
    now: Point
    then: Point


@register("unipc", order="2 to 5 (predictor's order + 1)", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class UniPC(Multistep):
    """Unified predictor-corrector (Zhao et al. 2023, Algorithms 1-2, B(h) version).

    The corrector re-uses the evaluation at the predicted state, which the next step needs anyway, so it costs
    none; the state it corrects is the one the next step starts from. The end itself is not corrected, as in the
    paper.

    Args:
        order: p of UniP-p and UniC-p, 1 to 4.
        variant: B(h) = h (``bh1``, for unguided sampling) or e^h - 1 (``bh2``). They differ where the paper
            sets a = 1/2 instead of solving: in UniP-2 and UniC-1.
        predict: expand ``x0`` or the ``noise``.
        disable_corrector: numbers of the steps, from 0, whose result is not corrected.
        predictor: ``unip``, or the name of another multistep sampler whose result UniC corrects.
        lower_order_final: the last p - 1 steps have falling orders, whatever the number of steps.
    """

    name: ClassVar[str] = "unipc"

    order: int = 2  # type: ignore[misc]
    variant: str = "bh2"
    predict: str = "x0"
    disable_corrector: Sequence[int] = ()
    predictor: str = UNIP

    def __post_init__(self) -> None:
        self._level("order", 1, 4)
        super().__post_init__()
        self._choice("variant", VARIANTS)
        self._choice("predict", PREDICTS)
        skipped = self.disable_corrector
        if not isinstance(skipped, list | tuple) or not all(type(n) is int and n >= 0 for n in skipped):
            raise KitError(
                "sampler 'unipc': option 'disable_corrector' must be a list of whole numbers from 0, "
                f"not {skipped!r}"
            )
        object.__setattr__(self, "disable_corrector", tuple(skipped))
        if self.predictor != UNIP:
            choices = [UNIP, *(name for name in registry.names() if _multistep(name))]
            if self.predictor not in choices:
                raise KitError("sampler 'unipc': " + unknown("predictor", self.predictor, choices))

    def step_order(self, i: int, count: int, then: Point) -> int:
        if then.sigma == 0 or self.orders is not None:
            return super().step_order(i, count, then)
        return min(self.order, i + 1, count - i if self.lower_order_final else count)

    def solve(self, x: Form, run: Run) -> Form:
        other: Multistep | None = None if self.predictor == UNIP else registry.create(self.predictor)
        kept = max(self.order, other.history if other else 1)
        data, noises = list[Evaluation](), list[Evaluation]()
        last: _Step | None = None
        count = len(run.points) - 1
        for i, now, then in run.steps:
            x0 = run.denoise(x, now)
            data, noises = [(now, x0), *data][:kept], [(now, noise_in(x, x0, now)), *noises][:kept]
            answers = data if self.predict == "x0" else noises
            if last is not None and i - 1 not in self.disable_corrector:
                x = run.keep(self.step_along(last, answers[0][1]))
            last = _Step(x, answers[: self.step_order(i, count, then)], now, then)
            if other is None:
                x = run.step(self.step_along(last))
            else:
                theirs = noises if other.expands_noise else data
                used = theirs[: other.step_order(i, count, then)]
                x = run.step(other.update(x, used, now, then, run))
        return x

    def step_along(self, step: _Step, corrected: Form | None = None) -> Form:
        """UniP over the step, or, with the answer at its end, UniC (eq. 3 and 9; 5 and 8 for the noise)."""
        now, then = step.now, step.then
        first = step.answers[0][1]
        if self.predict == "x0":
            move, scale, h = data_step, then.alpha, then.lam - now.lam
        else:
            move, scale, h = noise_step, then.sigma, now.lam - then.lam
        total = move(step.x, [(1, first)], now, then)
        # Where the other answers lie, in steps; one infinitely long ago has no say.
        others = [
            ((at.lam - now.lam) / (then.lam - now.lam), answer)
            for at, answer in step.answers[1:]
            if math.isfinite(at.lam)
        ]
        if corrected is not None:
            others.append((1.0, corrected))
        if others:
            weights = self.residual_weights([place for place, _ in others], h)
            total = total + scale * combine(weights, [answer - first for _, answer in others])
        return total

    def residual_weights(self, places: Sequence[float], h: float) -> list[float]:
        """B(h) a_m / r_m of the answers at r_m: what makes the step exact for polynomials through them.

        Σ B(h) a_m r_m^(k-1) = k! psi_(k+1)(h) for all k (eq. 6); with a single answer the paper takes
        a = 1/2, whatever the solution is (Theorem 3.1 and Appendix E.3).
        """
        if len(places) == 1:
            return [(h if self.variant == "bh1" else psi(1, h)) / 2 / places[0]]
        matrix = np.vander(places, increasing=True).T
        moments = [math.factorial(k) * psi(k + 1, h) for k in range(1, len(places) + 1)]
        solution: list[float] = np.linalg.solve(matrix, moments).tolist()
        return [a / place for a, place in zip(solution, places, strict=True)]


def _multistep(name: str) -> bool:
    part = registry.get(name)
    return isinstance(part, type) and issubclass(part, Multistep) and part is not UniPC

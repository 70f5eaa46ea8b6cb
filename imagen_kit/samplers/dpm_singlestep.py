"""DPM-Solver and DPM-Solver++ single-step: 1S, 2S and 3S."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.errors import KitError
from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import noise_in, split
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import KINDS, Evaluation, data_step, expansion, noise_step
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


@dataclass(frozen=True, kw_only=True)
class Singlestep(Sampler):
    """Groups of k grid times make one step of order k; its inner stages are the group's own grid times.

    One evaluation a grid time, so ``steps`` counts evaluations. On the ``log_snr`` grid the inner stages lie
    at 1/2 of lambda (order 2), or at 1/3 and 2/3 (order 3), as in the papers.

    Args:
        kind: how the derivatives enter. Order 2: ``midpoint`` (the papers' formula) or ``heun``. Order 3:
            ``midpoint`` uses the slope to the last stage only (the papers' last line), ``heun`` the parabola
            through the stages.
        lower_order_final: replace a complete last group of order k by one of order k - 1 and one of order 1,
            as the papers do for k = 3 (Lu et al. 2022a, section 3.4).
        groups: the order of every group, whose sum is the number of steps, instead of groups of order k.
    """

    spacing: str = "log_snr"
    kind: str = "midpoint"
    lower_order_final: bool = False
    groups: Sequence[int] | None = None

    #: Whether the noise is expanded (DPM-Solver) or x0 (DPM-Solver++).
    expands_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("kind", KINDS)
        if self.groups is None:
            return
        whole = isinstance(self.groups, list | tuple) and all(type(n) is int for n in self.groups)
        if not whole or not all(1 <= n <= self.order for n in self.groups):
            raise KitError(
                f"sampler {self.name!r}: option 'groups' must be a list of whole numbers from 1 to "
                f"{self.order}, whose sum is the number of steps, not {self.groups!r}"
            )
        object.__setattr__(self, "groups", tuple(self.groups))

    def stage_orders(self, count: int, to_clean: bool) -> list[int]:
        """For every grid time the order of the update from its group's start; 1 opens a group."""
        groups = self.groups
        if groups is None:
            full, rest = divmod(count, self.order)
            groups = [self.order] * full + ([rest] if rest else [])
            if self.lower_order_final and rest == 0 and self.order > 1:
                groups[-1:] = [self.order - 1, 1]
        elif sum(groups) != count:
            raise KitError(
                f"sampler {self.name!r}: option 'groups' makes {sum(groups)} steps, and the grid has {count}"
            )
        orders = [order for size in groups for order in range(1, size + 1)]
        if to_clean:  # at sigma = 0 the answer itself is the step
            orders[-1] = 1
        return orders

    def terms(self, answers: list[Evaluation], then: Point) -> list[tuple[int, Form]]:
        """The expansion of a group's answers over the step from its start."""
        order, h = len(answers), then.lam - answers[0][0].lam
        if order == 3:  # the two-point formula of the third-order step is psi_2's, not the midpoint's
            return expansion(answers[::2] if self.kind == "midpoint" else answers, h, "heun")
        return expansion(answers, h, self.kind)

    def update(self, x: Form, terms: list[tuple[int, Form]], start: Point, then: Point, run: Run) -> Form:
        """The step from a group's start, or to one of its stages."""
        return (noise_step if self.expands_noise else data_step)(x, terms, start, then)

    def solve(self, x: Form, run: Run) -> Form:
        start, answers = x, list[Evaluation]()
        orders = self.stage_orders(len(run.points) - 1, run.points[-1].sigma == 0)
        for (_, now, then), order in zip(run.steps, orders, strict=True):
            x0 = run.denoise(x, now)
            if order == 1:
                start, answers = x, []
            answers.append((now, noise_in(x, x0, now) if self.expands_noise else x0))
            x = run.step(self.update(start, self.terms(answers, then), answers[0][0], then, run))
        return x


@dataclass(frozen=True, kw_only=True)
class DataSinglestep(Singlestep):
    """Single steps with data prediction, of the ODE or of the reverse SDE.

    Args:
        eta: strength of the noise; 0 is the papers' ODE solver. Above, every stage is one of
            SDE-DPM-Solver++, with noise of its own.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, math.inf)

    def update(self, x: Form, terms: list[tuple[int, Form]], start: Point, then: Point, run: Run) -> Form:
        return data_step(x, terms, start, then, self.eta, run.noise())


@register("dpm_solver_1s", order=1, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver1s(Singlestep):
    """DPM-Solver-1: first order, noise prediction (Lu et al. 2022a, eq. 3.7), which is DDIM."""

    name: ClassVar[str] = "dpm_solver_1s"
    order: ClassVar[int] = 1
    expands_noise: ClassVar[bool] = True


@register("dpm_solver_2s", order=2, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver2s(Singlestep):
    """DPM-Solver-2: single-step, second order, noise prediction (Lu et al. 2022a, Algorithm 1)."""

    name: ClassVar[str] = "dpm_solver_2s"
    order: ClassVar[int] = 2
    expands_noise: ClassVar[bool] = True


@register("dpm_solver_3s", order=3, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class DpmSolver3s(Singlestep):
    """DPM-Solver-3: single-step, third order, noise prediction (Lu et al. 2022a, Algorithm 2)."""

    name: ClassVar[str] = "dpm_solver_3s"
    order: ClassVar[int] = 3
    expands_noise: ClassVar[bool] = True

    lower_order_final: bool = True


@register("dpmpp_2s", order=2, stochastic="eta > 0", evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2s(DataSinglestep):
    """DPM-Solver++(2S): single-step, second order, data prediction (Lu et al. 2022b, Algorithm 1)."""

    name: ClassVar[str] = "dpmpp_2s"
    order: ClassVar[int] = 2


@register("dpmpp_3s", order=3, stochastic="eta > 0", evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp3s(DataSinglestep):
    """DPM-Solver++(3S): single-step, third order, data prediction (Lu et al. 2022b, Appendix B)."""

    name: ClassVar[str] = "dpmpp_3s"
    order: ClassVar[int] = 3

    lower_order_final: bool = True


@register(
    "dpmpp_2s_ancestral", order=2, stochastic=True, evaluations="2 steps - 1 (2 steps with 'sigma_min')"
)
@dataclass(frozen=True, kw_only=True)
class Dpmpp2sAncestral(Sampler):
    """DPM-Solver++(2S) to a level below the next one, and fresh noise back up to it (k-diffusion's "2S a").

    Two evaluations a step, the second half-way in lambda to that lower level; one in a step to sigma = 0.

    Args:
        eta: share of the noise drawn anew, as in ``euler_ancestral``; 0 is DPM-Solver++(2S).
    """

    name: ClassVar[str] = "dpmpp_2s_ancestral"
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int] = 10

    spacing: str = "log_snr"
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._range("eta", 0.0, 1.0)

    def solve(self, x: Form, run: Run) -> Form:
        for _, now, then in run.steps:
            first = [(1, run.denoise(x, now))]
            if then.sigma == 0:
                x = run.step(data_step(x, first, now, then))
                continue
            down, up = split(now, then, self.eta)
            middle = run.point((now.lam + down.lam) / 2)
            second = [(1, run.denoise(data_step(x, first, now, middle), middle))]
            x = run.step(data_step(x, second, now, down) + then.sigma * up * run.noise())
        return x

"""DPM-Solver and DPM-Solver++ single-step: 2S and 3S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.ancestral import ddim_step, noise_in
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.exponential import KINDS, Evaluation, data_step, expansion, noise_step
from imagen_kit.samplers.tableau import Form


@dataclass(frozen=True, kw_only=True)
class Singlestep(Sampler):
    """Groups of k grid times make one step of order k; its inner stages are the group's own grid times.

    One evaluation a grid time, so ``steps`` counts evaluations. On the ``log_snr`` grid the inner stages lie
    at 1/2 of lambda (order 2), or at 1/3 and 2/3 (order 3), as in the papers.

    Args:
        kind: how the derivatives enter. Order 2: ``midpoint`` (the papers' formula) or ``heun``. Order 3:
            ``midpoint``
            uses the slope to the last stage only (the papers' last line), ``heun`` the parabola through the
            stages.
        lower_order_final: replace a complete last group of order k by one of order k - 1 and one of order 1,
            as the
            papers do for k = 3 (Lu et al. 2022a, section 3.4).
    """

    spacing: str = "log_snr"
    kind: str = "midpoint"
    lower_order_final: bool = False

    #: Whether the noise is expanded (DPM-Solver) or x0 (DPM-Solver++).
    expands_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("kind", KINDS)

    def stage_orders(self, count: int, to_clean: bool) -> list[int]:
        """For every grid time the order of the update from its group's start; 1 opens a group."""
        group = list(range(1, self.order + 1))
        groups, rest = divmod(count, self.order)
        orders = group * groups + group[:rest]
        if self.lower_order_final and rest == 0:
            orders[-1] = 1
        if to_clean:  # at sigma = 0 the answer itself is the step
            orders[-1] = 1
        return orders

    def solve(self, x: Form, run: Run) -> Form:
        start, answers = x, list[Evaluation]()
        orders = self.stage_orders(len(run.points) - 1, run.points[-1].sigma == 0)
        for (_, now, then), order in zip(run.steps, orders, strict=True):
            x0 = run.denoise(x, now)
            if order == 1:
                start, answers = x, []
            answers.append((now, noise_in(x, x0, now) if self.expands_noise else x0))
            if order == 1:
                x = run.step(ddim_step(x, x0, now, then))
                continue
            origin = answers[0][0]
            used = [answers[0], answers[-1]] if order == 3 and self.kind == "midpoint" else answers
            # The two-point formula of the third-order step is psi_2's, not the midpoint's.
            terms = expansion(used, then.lam - origin.lam, "heun" if order == 3 else self.kind)
            update = noise_step if self.expands_noise else data_step
            x = run.step(update(start, terms, origin, then))
        return x


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


@register("dpmpp_2s", order=2, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp2s(Singlestep):
    """DPM-Solver++(2S): single-step, second order, data prediction (Lu et al. 2022b, Algorithm 1)."""

    name: ClassVar[str] = "dpmpp_2s"
    order: ClassVar[int] = 2


@register("dpmpp_3s", order=3, stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class Dpmpp3s(Singlestep):
    """DPM-Solver++(3S): single-step, third order, data prediction (Lu et al. 2022b, Appendix B)."""

    name: ClassVar[str] = "dpmpp_3s"
    order: ClassVar[int] = 3

    lower_order_final: bool = True

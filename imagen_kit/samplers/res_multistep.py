"""RES: refined exponential solver, multistep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imagen_kit.samplers import register
from imagen_kit.samplers.base import Run
from imagen_kit.samplers.dpm_multistep import Multistep
from imagen_kit.samplers.exponential import Evaluation, data_step, expansion
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


@register("res_multistep", order="1 to 3", stochastic=False, evaluations="steps")
@dataclass(frozen=True, kw_only=True)
class ResMultistep(Multistep):
    """RES: multistep exponential integrator with the exact phi weights (Zhang et al. 2023).

    "Improved order analysis and design of exponential integrator for diffusion models sampling".

    With c = (lambda_{i-1} - lambda_i) / h the two-step weights are b1 = phi_1 - phi_2 / c, b2 = phi_2 / c,
    which meet all order conditions; DPM-Solver++(2M) of kind ``midpoint`` meets them to leading order only.
    The order is kept up to the step to sigma = 0.

    Args:
        order: 1 to 3, how many answers a step uses; the first steps use as many as there are.
    """

    name: ClassVar[str] = "res_multistep"

    order: int = 2  # type: ignore[misc]
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        self._level("order", 1, 3)
        super().__post_init__()

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        return data_step(x, expansion(answers, then.lam - now.lam), now, then)

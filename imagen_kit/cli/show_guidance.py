"""What a stage's guidance costs, for ``imagen-kit show``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imagen_kit.errors import KitError
from imagen_kit.guidance.base import Branch, Guidance, branches
from imagen_kit.guidance.step import Step


@dataclass(frozen=True)
class Cost:
    """Evaluations of one picture in one stage.

    Attributes:
        passes: how many predictions each call of the guided denoiser evaluates, in order.
        names: what they are.
    """

    passes: list[int]
    names: list[str]

    def __str__(self) -> str:
        least, most = min(self.passes), max(self.passes)
        text = str(len(self.passes))
        if most > 1:
            each = f"{most}" if least == most else f"{least} to {most}"
            text += f", each of {each} network passes ({', '.join(self.names)}), {sum(self.passes)} in all"
        return text


def cost(sampler: Any, schedule: Any, steps: int | None, strategies: tuple[Guidance, ...]) -> Cost:
    """The cost of sampling with a stack of guidance: exact, since both are functions of the time.

    Of a sampler without a tableau every step counts as one call.
    """
    try:
        tableau = sampler.tableau(schedule, steps)
        calls, times = [row.t for row in tableau.rows if row.t is not None], tableau.times
    except KitError:
        times = tuple(point.t for point in sampler.points(schedule, steps))
        calls = list(times[:-1])

    def read(t: float) -> list[Branch]:
        alpha, sigma = schedule.alpha_sigma(t)
        return branches(strategies, Step(t, alpha, sigma, times))

    found = [read(t) for t in calls]
    names = dict.fromkeys(branch.name for each in found for branch in each)
    return Cost([len(each) for each in found], list(names))

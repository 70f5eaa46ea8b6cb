"""How a sampler treats errors, on the linear test equation of diffusion models.

For Gaussian data of standard deviation s the ideal denoiser is linear,

    x0(x, t) = alpha s² / (alpha² s² + sigma²) x,

and the exact solution keeps its place in the distribution: |x(t)| grows as the spread
sqrt(alpha² s² + sigma²) of x_t does. Every s is one eigenvalue of a real denoiser's Jacobian, from s = 0 (a
direction in which the data do not vary) to s → ∞ (one the denoiser copies); this is the counterpart of
Dahlquist's x' = λ x. In a tableau every slot is then a number times the starting state, so the growth of an
error is found exactly, by running the rows on numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagen_kit.samplers.tableau import Tableau
from imagen_kit.schedules.base import Schedule

#: Standard deviations of the data that are tried.
SPREADS = tuple(float(s) for s in np.logspace(-3, 3, 49))


@dataclass(frozen=True)
class Stability:
    """Growth on the test equation; 1 is what the exact solution does.

    Attributes:
        growth: the largest factor by which an error made in one state has grown, in units of the spread of
            x_t, in any later state, over all spreads of the data.
        spread: the data's standard deviation where that happens.
        made, seen: sampling steps (from 0) after which the error is made (-1: in the noisy start) and seen.
    """

    growth: float
    spread: float
    made: int
    seen: int

    def __str__(self) -> str:
        if self.growth < 1 + 1e-6:
            return "no error ever grows on the linear test equation"
        made = "in the noisy start" if self.made < 0 else f"after step {self.made + 1}"
        return (
            f"an error grows by at most {self.growth:.4g} on the linear test equation "
            f"(made {made}, seen after step {self.seen + 1}, data of standard deviation {self.spread:.2g})"
        )


def stability(tableau: Tableau, schedule: Schedule, spreads: Sequence[float] = SPREADS) -> Stability:
    """How errors grow along a tableau on Gaussian data.

    Args:
        tableau: of a sampler on ``schedule``.
        schedule: its noise schedule.
        spreads: standard deviations of the data to try, each above 0.
    """
    s = np.asarray(spreads, dtype=float)
    growth = growths(tableau, schedule, s)
    seen, made, k = np.unravel_index(int(np.argmax(growth)), growth.shape)
    return Stability(float(growth[seen, made, k]), float(s[k]), int(made) - 1, int(seen) - 1)


def growths(tableau: Tableau, schedule: Schedule, spreads: np.ndarray) -> np.ndarray:
    """Growth of an error made in one state and seen in another, in units of the spread of x_t there.

    Args:
        spreads: (k,) standard deviations of the data.

    Returns:
        (states, states, k): seen in, made in, spread; 0 where it is not seen later than made. State 0 is the
        noisy start, state i the end of step i. Noise is left out: it is no error.
    """
    # One run for each state an error can be made in: axis 0 is where, axis 1 the data's spread.
    sources = len(tableau.times)
    values = {"x": np.zeros((sources, len(spreads)))}
    values["x"][0] = 1.0
    states = np.zeros((sources, sources, len(spreads)))
    states[0] = values["x"]
    for row in tableau.rows:
        if row.computes:
            known = ((slot, weight) for slot, weight in row.weights if slot in values)
            values[row.state] = sum(
                (weight * values[slot] for slot, weight in known), np.zeros_like(states[0])
            )
        if row.step is not None:
            state = values[row.state].copy()
            state[row.step + 1] += 1.0
            values[row.state] = states[row.step + 1] = state
        if row.t is not None:
            alpha, sigma = schedule.alpha_sigma(row.t)
            gain = alpha * spreads**2 / (alpha**2 * spreads**2 + sigma**2)
            for output in row.outputs:
                values[output] = gain * values[row.state]
    spread = _spreads(tableau, schedule, spreads)
    relative = np.abs(states) / spread[:, None] * spread[None, :]
    seen, made = np.indices(relative.shape[:2])
    relative[seen <= made] = 0.0
    return relative


def _spreads(tableau: Tableau, schedule: Schedule, s: np.ndarray) -> np.ndarray:
    """(states, spreads): the standard deviation of x_t at every grid time."""
    middle = [schedule.alpha_sigma(t) for t in tableau.times[1:-1]]
    points = np.array([tableau.start, *middle, tableau.end])
    return np.sqrt(points[:, :1] ** 2 * s**2 + points[:, 1:] ** 2)

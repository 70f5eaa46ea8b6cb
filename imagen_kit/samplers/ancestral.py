"""The ancestral step that DDPM, DDIM, Euler and Euler ancestral share."""

from __future__ import annotations

import math

from imagen_kit.samplers.base import Run
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form


def noise_in(x: Form, x0: Form, now: Point) -> Form:
    """The noise the network sees in ``x``: (x - alpha x0) / sigma."""
    return (x - now.alpha * x0) / now.sigma


def ddim_step(x: Form, x0: Form, now: Point, then: Point, source: Form | None = None) -> Form:
    """Keep x0 and the noise, change their shares: alpha' x0 + sigma' noise (Song et al. 2021, eq. 12, eta =
    0).

    It is also Euler's step in sigma / alpha, Euler's step along the straight line of flow matching, and
    DPM-Solver-1. It needs neither alpha > 0 at the start nor sigma > 0 at the end. ``source`` is the x0 the
    noise is read from where that is another one (CFG++).
    """
    return then.alpha * x0 + then.sigma * noise_in(x, x0 if source is None else source, now)


def fresh_share(now: Point, then: Point) -> float:
    """1 - (ratio' / ratio)², the share of the noise at ``then`` that the exact reverse process draws anew."""
    # Rounding may put it just below 0 in a step that hardly moves.
    return max(0.0, 1 - (then.sigma * now.alpha / (then.alpha * now.sigma)) ** 2)


def split(now: Point, then: Point, eta: float) -> tuple[Point, float]:
    """(the point below ``then`` that a deterministic step goes to, the share of then.sigma drawn anew).

    The share is eta sqrt(1 - (ratio'/ratio)²); what is left of the noise lies at ``then``'s own time, since
    the state is scaled as there.
    """
    share = eta * math.sqrt(fresh_share(now, then))
    return Point(then.t, then.alpha, then.sigma * math.sqrt(1 - share * share)), share


def ancestral_step(
    x: Form, x0: Form, now: Point, then: Point, eta: float, run: Run, source: Form | None = None
) -> Form:
    """``ddim_step`` with the share eta² (1 - (ratio'/ratio)²) of the noise variance drawn anew.

    eta = 0 is the deterministic step, eta = 1 samples the Gaussian posterior q(x' | x, x0) (Ho et al. 2020,
    eq. 6-7). The formula is that of DDIM (eq. 16) freed of alpha² + sigma² = 1, so that it serves flow and
    variance-exploding schedules too.
    """
    if eta == 0:
        return ddim_step(x, x0, now, then, source)
    share = eta * eta * fresh_share(now, then)
    kept = then.sigma * math.sqrt(1 - share)
    old = noise_in(x, x0 if source is None else source, now)
    return then.alpha * x0 + kept * old + then.sigma * math.sqrt(share) * run.noise()

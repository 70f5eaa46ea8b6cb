"""Where a sampler steps: spacings of the time grid, and the points they make.

A spacing is a function (schedule, steps, closed, options) -> native times, noisiest first. Open grids have
``steps`` times, and the end of sampling is not one of them; closed grids have ``steps + 1`` times, the last being
``schedule.t_min``, which is the end. An end at sigma = 0 goes with an open grid and one at ``t_min`` with a closed
grid, but for published systems that have it otherwise (``GridOptions.closed``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.samplers import step_lists
from imagen_kit.schedules.base import UNIT_RATIOS, Schedule


@dataclass(frozen=True)
class Point:
    """A time with its coefficients: x = alpha x0 + sigma noise."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of x / alpha; inf where alpha is 0."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log-SNR; -inf where alpha is 0, inf where sigma is 0."""
        if not self.alpha:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


@dataclass(frozen=True)
class GridOptions:
    """``offset``: added to the integer times of ``leading``; ``rho``: exponent of ``karras``; ``closed``: whether
    the spacing's times include the end's, None = where the end is ``t_min``."""

    offset: int = 0
    rho: float = 7.0
    closed: bool | None = None


#: Spacings that keep to the whole times of a discrete schedule, and so end with them.
MOST_STEPS = 100_000
WHOLE_TIMES = ("linspace", "leading", "trailing", "auto")
Spacing = Callable[[Schedule, int, bool, GridOptions], np.ndarray]
SPACINGS: dict[str, Spacing] = {}


def spacing(name: str) -> Callable[[Spacing], Spacing]:
    """Decorator that adds a spacing under ``name``."""

    def add(function: Spacing) -> Spacing:
        SPACINGS[name] = function
        return function

    return add


@spacing("linspace")
def linspace(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Evenly from the noisiest to the cleanest time, both included (integers for discrete schedules)."""
    count = steps + closed
    if schedule.discrete:
        return np.linspace(schedule.discrete - 1, 0, count).round()
    return _shifted(schedule, np.linspace(1, 0, count))


@spacing("leading")
def leading(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Every k-th time from the clean end up, k = T // steps, plus ``offset`` (DDPM, DDIM, SD).

    Closed grids have k = T // (steps + 1) and end at time 0 (DPM-Solver's use of the same name). A single
    open step would lie at the clean end; it is put at the noisy one.
    """
    count = steps + closed
    if count == 1:
        return np.array([schedule.t_max])
    if schedule.discrete:
        times = np.arange(count)[::-1] * float(schedule.discrete // count)
        times[:steps] += options.offset
        return times
    return _shifted(schedule, np.arange(count)[::-1] / count)


@spacing("trailing")
def trailing(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Evenly from the noisiest time down, without the clean end (Lin et al. 2023, Table 2; flow models)."""
    if schedule.discrete:
        times = np.round(schedule.discrete * (1 - np.arange(steps) / steps)) - 1
        # With as many steps as there are times the last open time is 0 already.
        return np.append(times, 0.0) if closed and times[-1] > 0 else times
    uniform = 1 - np.arange(steps + closed) / steps
    return _shifted(schedule, uniform)


@spacing("sd3")
def sd3(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Evenly from the noisiest time to the shifted 1/1000 of the way up, and then shifted (SD3's published code).

    The shift acts twice on the last time: the levels between which that code spaces evenly are shifted already.
    """
    uniform = np.linspace(1, schedule.shift_time(1e-3), steps)
    return _shifted(schedule, np.append(uniform, 0.0) if closed else uniform)


@spacing("karras")
def karras(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """sigma / alpha evenly in its 1/rho-th power (Karras et al. 2022, eq. 5)."""

    def spread(high: float, low: float, count: int) -> np.ndarray:
        return np.linspace(high ** (1 / options.rho), low ** (1 / options.rho), count) ** options.rho

    return _in_ratio(schedule, steps, closed, spread)


@spacing("log_snr")
def log_snr(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """log(sigma / alpha) evenly (Lu et al. 2022a, section 3.4)."""

    def spread(high: float, low: float, count: int) -> np.ndarray:
        return np.exp(np.linspace(math.log(high), math.log(low), count))

    return _in_ratio(schedule, steps, closed, spread)


#: sigma / alpha of the ten-step schedules optimised for Stable Diffusion 1.5, SDXL and Stable Video Diffusion
#: (Sabour et al. 2024, Align Your Steps, and their published quick-start guide).
ALIGNED = {
    "sd15": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def _aligned(schedule: Schedule, steps: int, closed: bool, model: str) -> np.ndarray:
    """The list of ``model``, log-linearly interpolated to any number of steps, as its authors do.

    On a schedule of another range of sigma / alpha the list is stretched to it, evenly in the logarithm.
    """
    logs = np.log(ALIGNED[model])
    shape = (logs - logs[-1]) / (logs[0] - logs[-1])

    def spread(high: float, low: float, count: int) -> np.ndarray:
        # An open grid leaves the list's last level out: the step that would go there goes to sigma = 0.
        levels = np.interp(np.linspace(0, 1, count + (not closed)), np.linspace(0, 1, len(shape)), shape)
        return np.exp(math.log(low) + levels[:count] * (math.log(high) - math.log(low)))

    return _in_ratio(schedule, steps, closed, spread)


@spacing("align_your_steps")
def align_your_steps(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Levels optimised for Stable Diffusion 1.5, for SVD where time is the noise level (Sabour et al. 2024)."""
    return _aligned(schedule, steps, closed, "sd15" if math.isfinite(schedule.domain[1]) else "svd")


@spacing("align_your_steps_sdxl")
def align_your_steps_sdxl(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Levels optimised for SDXL (Sabour et al. 2024)."""
    return _aligned(schedule, steps, closed, "sdxl")


@spacing("beta")
def beta(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """Times at even quantiles of Beta(0.6, 0.6), denser at both ends (Lee et al. 2024, Beta Sampling).

    Where time is the noise level and unbounded (edm), the quantiles are taken in log(sigma / alpha).
    """
    from scipy.special import betaincinv

    def quantiles(count: int) -> np.ndarray:
        falling = np.linspace(1, 0, count) if closed else 1 - np.arange(count) / count
        return betaincinv(0.6, 0.6, falling)

    if math.isfinite(schedule.domain[1]):
        return _shifted(schedule, quantiles(steps + closed))

    def spread(high: float, low: float, count: int) -> np.ndarray:
        return np.exp(math.log(low) + quantiles(count) * (math.log(high) - math.log(low)))

    return _in_ratio(schedule, steps, closed, spread)


@spacing("auto")
def auto(schedule: Schedule, steps: int, closed: bool, options: GridOptions) -> np.ndarray:
    """``trailing`` where time is bounded, ``karras`` where it is the noise level itself (edm)."""
    return (trailing if math.isfinite(schedule.domain[1]) else karras)(schedule, steps, closed, options)


SPACINGS["exponential"] = log_snr
SPACINGS.update(step_lists.SPACINGS)


def grid(
    schedule: Schedule,
    steps: int,
    spacing: str,
    final: str,
    options: GridOptions = GridOptions(),
) -> list[Point]:
    """Points of the grid, noisiest first, ``steps`` intervals; the last is the end of sampling.

    Raises:
        KitError: unknown spacing, more steps than the schedule has times, a spacing that does not fit.
    """
    if spacing not in SPACINGS:
        raise KitError(unknown("spacing", spacing, SPACINGS))
    if steps > MOST_STEPS:
        raise KitError(f"steps must be at most {MOST_STEPS:,}, not {steps:,}")
    at_zero = final == "zero"
    closed = not at_zero if options.closed is None else options.closed
    most = schedule.discrete - closed if schedule.discrete else steps
    if steps > most and spacing in WHOLE_TIMES:
        raise KitError(
            f"steps must be at most {most} on a schedule of {schedule.discrete} times, not {steps}"
        )

    def spaced(closed: bool) -> list[Point]:
        return [_point(schedule, t) for t in SPACINGS[spacing](schedule, steps, closed, options).tolist()]

    points = spaced(closed)
    if points[-1].sigma == 0 and not closed:
        points = spaced(True)  # clean already (t_min = 0): one more step would lead nowhere
    if at_zero or not closed:  # else the last of them is the end
        end = clean(schedule) if at_zero else _point(schedule, schedule.t_min)
        points = [*points[:steps], end]
    return check(schedule, points)


def explicit(
    schedule: Schedule,
    timesteps: Sequence[float] | Tensor | None,
    sigmas: Sequence[float] | Tensor | None,
    final: str,
) -> list[Point]:
    """Points of a grid given as native times or as sigma / alpha ratios, noisiest first.

    The clean end is appended unless ``final`` is ``"sigma_min"`` or the last entry has sigma = 0 already.

    Raises:
        KitError: both or neither given, an empty grid, times outside the schedule or not falling.
    """
    if (timesteps is None) == (sigmas is None):
        raise KitError("give the grid either as timesteps or as sigmas, not both")
    if timesteps is not None:
        times = list(numbers(timesteps, "timesteps"))
    else:
        assert sigmas is not None
        ratios = list(numbers(sigmas, "sigmas"))
        if any(not ratio >= 0 for ratio in ratios):
            raise KitError("sigmas (sigma / alpha ratios) must not be negative")
        times = [schedule.t_of_ratio(ratio) for ratio in ratios]
        if ratios and ratios[-1] == 0:
            return check(schedule, [*(_point(schedule, t) for t in times[:-1]), clean(schedule)])
    points = [_point(schedule, t) for t in times]
    if points and final == "zero" and points[-1].sigma > 0:
        points.append(clean(schedule))
    return check(schedule, points)


def check(schedule: Schedule, points: list[Point]) -> list[Point]:
    """The points, when there is at least one interval and noise only falls; KitError otherwise."""
    if len(points) < 2:
        raise KitError("a sampling grid needs at least one step: two times, or one and the clean end")
    for before, after in pairwise(points):
        if not after.lam > before.lam:
            raise KitError(
                f"a sampling grid must fall strictly in noise: t={before.t:g} is followed by t={after.t:g}"
            )
    return points


def clean(schedule: Schedule) -> Point:
    """The clean end: alpha = 1, sigma = 0, told as the time nearest to it."""
    return Point(min(schedule.t_of_ratio(0.0), schedule.t_min), 1.0, 0.0)


def _point(schedule: Schedule, t: float) -> Point:
    low, high = schedule.domain
    if not low <= t <= high:
        raise KitError(f"time {t:g} lies outside schedule {schedule.name!r}, which spans [{low:g}, {high:g}]")
    return Point(t, *schedule.alpha_sigma(t))


def numbers(values: Iterable[float] | Tensor, name: str) -> tuple[float, ...]:
    """A grid as floats.

    Raises:
        KitError: something that is not a row of numbers.
    """
    try:
        entries = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
        return tuple(map(float, entries))
    except (TypeError, ValueError):
        given = " ".join(str(values).split())[:40]
        raise KitError(f"{name} must be a row of numbers, noisiest first, not {given!r}") from None


def each_sample(
    timesteps: Sequence[float] | Tensor | None, sigmas: Sequence[float] | Tensor | None, batch: int
) -> list[tuple[float, ...]] | None:
    """The rows of a grid (b, n), one a sample; None where the grid is one for all.

    Raises:
        KitError: another number of rows than the batch has samples.
    """
    name, given = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
    try:
        array = np.asarray(given.tolist() if isinstance(given, Tensor) else given)
    except ValueError:  # rows of different lengths
        raise KitError(f"{name} holds grids of different lengths; give every sample as many steps") from None
    if array.ndim != 2:
        return None
    rows = [numbers(row, name) for row in array]
    if len(rows) != batch:
        raise KitError(f"{name} holds {len(rows)} grids for a batch of {batch}; give one, or one a sample")
    return rows


def _shifted(schedule: Schedule, uniform: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1] → native times of a continuous schedule, through its shift."""
    times = np.array([schedule.shift_time(float(u)) for u in uniform])
    return schedule.t_min + times * (schedule.t_max - schedule.t_min)


def _in_ratio(
    schedule: Schedule, steps: int, closed: bool, spread: Callable[[float, float, int], np.ndarray]
) -> np.ndarray:
    """Times whose sigma / alpha is spread by a rule over the schedule's range of it."""
    low_limit, high_limit = schedule.ratio_range
    noisiest, cleanest = _point(schedule, schedule.t_max).ratio, _point(schedule, schedule.t_min).ratio
    low, high = cleanest if closed else max(cleanest, low_limit), min(noisiest, high_limit)
    if low <= 0:
        raise KitError(
            f"spacings in sigma / alpha need sigma > 0 at t_min, which schedule {schedule.name!r} lacks"
        )
    count = steps + closed
    if math.isfinite(high):
        times = schedule.t_of_ratio(torch.from_numpy(spread(high, low, count))).numpy()
        if noisiest <= high_limit:
            times[0] = schedule.t_max  # exactly, whatever the inverse's last digit
    else:  # zero terminal SNR: the first time holds no signal at all, the rest is spread
        times = schedule.t_of_ratio(torch.from_numpy(spread(UNIT_RATIOS[1], low, count - 1))).numpy()
        times = np.append(schedule.t_max, times)
    if closed:
        times[-1] = schedule.t_min
    return times

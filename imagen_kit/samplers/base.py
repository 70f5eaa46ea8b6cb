"""The class every sampler derives from, and the trace that turns its formula into a tableau."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.samplers import batched, step_lists
from imagen_kit.samplers import grid as grids
from imagen_kit.samplers.asked import Asked, Grid, source
from imagen_kit.samplers.grid import GridOptions, Point
from imagen_kit.samplers.noise import Generators
from imagen_kit.samplers.tableau import Callback, Denoise, Form, Noise, Row, Tableau, without_waste
from imagen_kit.schedules.base import Schedule

FINALS = ("zero", "sigma_min")


class Run:
    """What a sampler's formula sees besides its own options: the grid, the network and the noise, traced.

    Attributes:
        schedule: the noise schedule.
        points: grid points from the noisy start to the end of sampling.
    """

    def __init__(self, schedule: Schedule, points: Sequence[Point]):
        self.schedule = schedule
        self.points = list(points)
        self.rows: list[Row] = []
        self._states = self._outputs = self._noises = self._steps = 0

    @property
    def steps(self) -> Iterator[tuple[int, Point, Point]]:
        """(number, where the step starts, where it ends) for every interval of the grid."""
        return ((i, now, then) for i, (now, then) in enumerate(pairwise(self.points)))

    @overload
    def denoise(self, x: Form, at: Point, also: tuple[()] = ()) -> Form: ...
    @overload
    def denoise(self, x: Form, at: Point, also: tuple[str, *tuple[str, ...]]) -> tuple[Form, ...]: ...
    def denoise(self, x: Form, at: Point, also: tuple[str, ...] = ()) -> Form | tuple[Form, ...]:
        """The network's x0 for the state ``x`` at a point (of the grid, or between its points).

        Args:
            x: the state.
            at: where it lies.
            also: names of further predictions of x0 from the same evaluation, e.g. ``("uncond",)``; the
                result is then a tuple, x0 first.
        """
        row = self._combine(x)
        outputs = tuple(f"d{self._outputs}{suffix}" for suffix in ("", *(f":{name}" for name in also)))
        self._outputs += 1
        self.rows[-1] = Row(row.state, row.weights, at.t, outputs, tuple(also), row.step)
        forms = tuple(Form({output: 1.0}) for output in outputs)
        return forms if also else forms[0]

    def noise(self) -> Form:
        """A fresh standard Gaussian. It is drawn only if its weight is not zero."""
        self._noises += 1
        return Form({f"n{self._noises - 1}": 1.0})

    def step(self, x: Form) -> Form:
        """End a sampling step at ``x``; go on with the returned form, which names the finished state."""
        row = self._combine(x)
        self.rows[-1] = replace(row, step=self._steps)
        self._steps += 1
        return Form({row.state: 1.0})

    def keep(self, x: Form) -> Form:
        """Compute ``x`` here and name it, so that what is made of it later reads one slot and not all of its own.

        For formulas that carry on a state which is neither evaluated nor the end of a step (a corrector's);
        unnamed, its terms would be written out again in every later row.
        """
        return x if x.slot is not None else Form({self._combine(x).state: 1.0})

    def point(self, lam: float) -> Point:
        """The schedule's point with half log-SNR ``lam``, for stages between grid points."""
        if math.isnan(lam):  # half-way to an end without signal
            raise ArithmeticError("there is no such point")
        t = self.schedule.t_of_log_snr(2 * lam)
        return Point(t, *self.schedule.alpha_sigma(t))

    def _combine(self, x: Form) -> Row:
        """Append the row that computes ``x``, or reuse the last one where that has just done so."""
        if not x.finite:
            raise OverflowError("a coefficient is not finite")
        slot = x.slot
        if slot is not None:
            if self.rows and self.rows[-1].state == slot and self.rows[-1].t is None:
                return self.rows[-1]
            row = Row(slot, ((slot, 1.0),))
        else:
            self._states += 1
            row = Row(f"s{self._states}", tuple((s, w) for s, w in x.terms.items() if w != 0.0))
        self.rows.append(row)
        return row


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler: immutable options and a formula; nothing is kept between calls.

    Subclasses write ``solve`` as their paper does, once, over forms. Samplers that are not linear in the
    network's answers override ``sample`` and ``tableau``.

    Args:
        spacing: where the grid's times lie when only ``steps`` is given; see ``imagen_kit.samplers.grid``.
        final: ``"zero"``: the last step goes to sigma = 0; ``"sigma_min"``: the grid's last time is the end.
        offset: added to the integer times of ``leading`` (1 for Stable Diffusion).
        rho: exponent of ``karras``.
        closed: whether the spacing counts the end among its times, as it does by default where ``final`` is
            ``"sigma_min"``. False with that: the spacing's last time is followed by the schedule's cleanest
            (Stable Diffusion's PLMS and DDIM). True with ``"zero"``: the spacing reaches down to the cleanest
            time, but in its place the last step goes to sigma = 0 (diffusers' DPM-Solvers).
    """

    name: ClassVar[str] = "custom"
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    decides: ClassVar[bool] = False  # on its steps as it goes, by what the network answers
    default_steps: ClassVar[int] = 20

    spacing: str = "auto"
    final: str = "zero"
    offset: int = 0
    rho: float = 7.0
    closed: bool | None = None

    def __post_init__(self) -> None:
        if self.spacing not in grids.SPACINGS:
            raise KitError(unknown("spacing", self.spacing, grids.SPACINGS))
        if self.final not in FINALS:
            raise KitError(unknown("final", self.final, FINALS))
        if not (isinstance(self.offset, int) and self.offset >= 0):
            raise KitError(f"sampler option 'offset' must be a whole number from 0, not {self.offset!r}")
        self._range("rho", 0.0, math.inf, open_low=True)
        if not (self.closed is None or isinstance(self.closed, bool)):
            raise KitError(f"sampler option 'closed' must be true, false or null, not {self.closed!r}")

    def _range(self, option: str, low: float, high: float, open_low: bool = False) -> None:
        """KitError unless the option is a number in [low, high] (or (low, high])."""
        value = getattr(self, option)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high or (open_low and value == low):
            rule = (
                f"from {low:g} to {high:g}"
                if math.isfinite(high)
                else f"{'above' if open_low else 'from'} {low:g}"
            )
            raise KitError(f"sampler {self.name!r}: option {option!r} must be a number {rule}, not {value!r}")

    def _level(self, option: str, low: int, high: int) -> None:
        """KitError unless the option is a whole number from ``low`` to ``high``."""
        value = getattr(self, option)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise KitError(
                f"sampler {self.name!r}: option {option!r} must be a whole number from {low} to {high}, "
                f"not {value!r}"
            )

    def _choice(self, option: str, choices: Sequence[str]) -> None:
        """KitError with the nearest valid value unless the option is one of ``choices``."""
        value = getattr(self, option)
        if value not in choices:
            raise KitError(f"sampler {self.name!r}: " + unknown(option, value, choices))

    def solve(self, x: Form, run: Run) -> Form:
        """The formula: from the noisy state ``x`` to the sample; ``run.step`` ends every step."""
        raise NotImplementedError

    def points(
        self,
        schedule: Schedule,
        steps: int | None = None,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
    ) -> list[Point]:
        """The grid: ``steps`` intervals of this sampler's spacing, or an explicit one.

        Raises:
            KitError: steps below 1 or not whole, or not those of the explicit grid; see also
                ``grid.explicit``.
        """
        _whole("steps", steps)
        if timesteps is None and sigmas is None:
            usual = step_lists.LENGTHS.get(self.spacing, self.default_steps)
            count = usual if steps is None else steps
            options = GridOptions(self.offset, self.rho, self.closed)
            return grids.grid(schedule, count, self.spacing, self.final, options)
        points = grids.explicit(schedule, timesteps, sigmas, self.final)
        if steps is not None and steps != len(points) - 1:
            raise KitError(f"the given grid has {len(points) - 1} steps, not {steps}; leave steps out")
        return points

    def tableau(
        self,
        schedule: Schedule,
        steps: int | None = None,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
        *,
        nfe: int | None = None,
    ) -> Tableau:
        """Trace the formula on a schedule and a grid; arguments as in ``sample``.

        Tableaus are remembered: the same sampler on the same schedule object and grid gives the same object.

        Raises:
            KitError: a grid that cannot be, or a sampler whose coefficients are not finite on it.
        """
        steps = self.budget(schedule, steps, timesteps, sigmas, nfe)
        _whole("steps", steps)  # before the memory: True and 1 look alike to it
        try:
            hash((self, schedule))
        except TypeError:  # an option or a schedule that cannot be a key
            return self.trace(schedule, self.points(schedule, steps, timesteps, sigmas))
        keys = None if timesteps is None else grids.numbers(timesteps, "timesteps")
        ratios = None if sigmas is None else grids.numbers(sigmas, "sigmas")
        return _remembered(self, schedule, steps, keys, ratios)

    def trace(self, schedule: Schedule, points: list[Point]) -> Tableau:
        """The tableau of these points; see ``tableau``, which finds them and remembers the result."""
        run = Run(schedule, points)
        start, end = points[0], points[-1]
        try:
            self.solve(Form({"x": 1.0}), run)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, KitError):
                raise
            where = next((f" ({key} = 0)" for key in ("alpha", "sigma") if getattr(start, key) == 0), "")
            raise KitError(
                f"sampler {self.name!r} does not fit schedule {schedule.name!r} starting at t={start.t:g}"
                f"{where}: step {run._steps + 1} has a coefficient that is not finite; try 'ddim'"
            ) from error
        times = tuple(point.t for point in points)
        ends = (start.alpha, start.sigma), (end.alpha, end.sigma)
        return Tableau(
            without_waste(run.rows), self.order, times, *ends, schedule.prior_std(start.t), self.name
        )

    def budget(
        self,
        schedule: Schedule,
        steps: int | None,
        timesteps: Grid | None,
        sigmas: Grid | None,
        nfe: int | None,
    ) -> int | None:
        """``steps``, or the most steps on this schedule that ``nfe`` evaluations pay for.

        Raises:
            KitError: ``nfe`` below what one step takes, not whole, or given with steps or a grid.
        """
        if nfe is None:
            return steps
        _whole("nfe", nfe)
        if steps is not None or timesteps is not None or sigmas is not None:
            raise KitError("give nfe, or steps, or a grid: each of them decides the number of steps")
        least = self.tableau(schedule, 1).nfe
        if least > nfe:
            raise KitError(f"sampler {self.name!r} takes {least} evaluations for one step; nfe={nfe} is less")

        def affordable(count: int) -> bool:
            try:
                return self.tableau(schedule, count).nfe <= nfe
            except KitError:  # more steps than the schedule has times
                return False

        return _largest(affordable, nfe)

    def nfe(self, steps: int) -> int:
        """Network evaluations of a run of ``steps`` steps (on a schedule without end effects)."""
        return self.tableau(_PLAIN, steps).nfe

    def steps_for(self, nfe: int) -> int:
        """The most steps whose evaluations do not exceed ``nfe``; at least 1."""
        return _largest(lambda count: self.nfe(count) <= nfe, max(nfe, 1))

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        steps: int | None = None,
        *,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
        nfe: int | None = None,
        generator: Generators | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """From noise to a sample.

        Args:
            denoise: (x, t) -> x0, shapes and dtype of x; t is a Python float, the schedule's native time
                (a float64 tensor (b,) on x's device where every sample has a grid of its own).
            x: (b, ...) noisy start in the schedule's coordinates, alpha x0 + sigma noise at the grid's first
                time; pure noise of standard deviation ``tableau.prior_std`` to begin from nothing.
            schedule: the noise schedule the network was trained on.
            steps: number of steps, ``default_steps`` when None.
            timesteps: explicit grid of native times, noisiest first; the last step then goes to the clean
                end, unless ``final="sigma_min"``, which makes the last entry the end. (b, n) gives every
                sample its own.
            sigmas: the same grid as sigma / alpha ratios.
            nfe: budget in network evaluations, in place of ``steps``: the most steps that fit.
            generator: source of noise for stochastic samplers; a list holds one a sample, so that a sample
                does not depend on the batch it is drawn in.
            noise: () -> tensor like x, called once a noise term, in order; instead of ``generator``.
            callback: (step, x, x0) after every step, counted from 0.

        Returns:
            The sample, of x's shape and dtype: alpha x0 + sigma noise at the grid's end, x0 at the clean end.
        """
        noise = source(x, generator, noise)
        asked = Asked(steps, timesteps, sigmas, nfe, generator, noise, callback)
        return self._sample(denoise, x, schedule, asked)

    def _sample(self, denoise: Denoise, x: Tensor, schedule: Schedule, asked: Asked) -> Tensor:
        """``sample``, its arguments checked; what samplers without a tableau write anew."""
        each = grids.each_sample(asked.timesteps, asked.sigmas, len(x) if x.ndim else 0)
        if each is None:
            tableau = self.tableau(schedule, asked.steps, asked.timesteps, asked.sigmas, nfe=asked.nfe)
            denoise = begin(denoise, tableau.times, asked.generator, tableau.plan.parts)
            return tableau.run(denoise, x, asked.noise, asked.callback)
        rows = [{asked.which: row} for row in each]
        tableaus = [self.tableau(schedule, asked.steps, **row, nfe=asked.nfe) for row in rows]  # type: ignore[arg-type]
        plan = batched.plan(tableaus, x)
        denoise = begin(denoise, batched.times(tableaus, x), asked.generator, plan.parts)
        return plan.run(denoise, x, asked.noise, asked.callback)


def begin(
    denoise: Denoise,
    times: Sequence[float] | Tensor,
    generator: Generators | None = None,
    parts: Sequence[str] = (),
) -> Denoise:
    """``denoise`` for one run: guidance that keeps something during a run starts afresh.

    Args:
        denoise: (x, t) -> x0; returned as it is where it has no ``begin``.
        times: the run's grid of native times, n numbers or (b, n).
        generator: source of the noise that guidance draws.
        parts: names of the further predictions that the sampler will ask for.
    """
    start = getattr(denoise, "begin", None)
    return denoise if start is None else start(times, generator, parts)


@functools.lru_cache(maxsize=256, typed=True)
def _remembered(
    sampler: Sampler,
    schedule: Schedule,
    steps: int | None,
    timesteps: tuple[float, ...] | None,
    sigmas: tuple[float, ...] | None,
) -> Tableau:
    """Samplers and schedules are immutable, so their tableau is too; tracing takes longer than running it."""
    return sampler.trace(schedule, sampler.points(schedule, steps, timesteps, sigmas))


def _largest(affordable: Callable[[int], bool], high: int) -> int:
    """The largest number from 1 to ``high`` that is affordable, taking 1 to be and dearer to follow dear."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle - 1)
    return low


def _whole(option: str, value: Any) -> None:
    """KitError unless ``value`` is None or a whole number of at least 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise KitError(f"{option} must be a whole number of at least 1, not {value!r}")


class _Plain(Schedule):
    """Schedule without limits, to count evaluations on."""

    name, t_min, t_max, domain = "plain", 1e-3, 1e3, (0.0, math.inf)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()


_PLAIN = _Plain()

"""The class every sampler derives from, and the trace that turns its formula into a tableau."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.samplers import grid as grids
from imagen_kit.samplers.grid import GridOptions, Point
from imagen_kit.samplers.tableau import Callback, Denoise, Form, Noise, Row, Tableau
from imagen_kit.schedules.base import Schedule

FINALS = ("zero", "sigma_min")
Grid = Sequence[float] | Tensor
Generators = torch.Generator | Sequence[torch.Generator]


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

    def denoise(self, x: Form, at: Point) -> Form:
        """The network's x0 for the state ``x`` at a point (of the grid, or between its points)."""
        row = self._combine(x)
        output = f"d{self._outputs}"
        self._outputs += 1
        self.rows[-1] = Row(row.state, row.weights, at.t, output, row.step)
        return Form({output: 1.0})

    def noise(self) -> Form:
        """A fresh standard Gaussian. It is drawn only if its weight is not zero."""
        self._noises += 1
        return Form({f"n{self._noises - 1}": 1.0})

    def step(self, x: Form) -> Form:
        """End a sampling step at ``x``; go on with the returned form, which names the finished state."""
        row = self._combine(x)
        self.rows[-1] = Row(row.state, row.weights, step=self._steps)
        self._steps += 1
        return Form({row.state: 1.0})

    def point(self, lam: float) -> Point:
        """The schedule's point with half log-SNR ``lam``, for stages between grid points."""
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
    """

    name: ClassVar[str] = "custom"
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    default_steps: ClassVar[int] = 20

    spacing: str = "auto"
    final: str = "zero"
    offset: int = 0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.spacing not in grids.SPACINGS:
            raise KitError(unknown("spacing", self.spacing, grids.SPACINGS))
        if self.final not in FINALS:
            raise KitError(unknown("final", self.final, FINALS))
        if not (isinstance(self.offset, int) and self.offset >= 0):
            raise KitError(f"sampler option 'offset' must be a whole number from 0, not {self.offset!r}")
        self._range("rho", 0.0, math.inf, open_low=True)

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
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        if steps is not None and (not whole or steps < 1):
            raise KitError(f"steps must be a whole number of at least 1, not {steps!r}")
        if timesteps is None and sigmas is None:
            count = self.default_steps if steps is None else steps
            return grids.grid(schedule, count, self.spacing, self.final, GridOptions(self.offset, self.rho))
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
    ) -> Tableau:
        """Trace the formula on a schedule and a grid; arguments as in ``sample``.

        Raises:
            KitError: a grid that cannot be, or a sampler whose coefficients are not finite on it.
        """
        points = self.points(schedule, steps, timesteps, sigmas)
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
        return Tableau(tuple(run.rows), self.order, times, *ends, schedule.prior_std(start.t))

    def nfe(self, steps: int) -> int:
        """Network evaluations of a run of ``steps`` steps (on a schedule without end effects)."""
        return self.tableau(_Plain(), steps).nfe

    def steps_for(self, nfe: int) -> int:
        """The most steps whose evaluations do not exceed ``nfe``; at least 1."""
        steps = max(nfe, 1)
        while steps > 1 and self.nfe(steps) > nfe:
            steps -= 1
        return steps

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        steps: int | None = None,
        *,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
        generator: Generators | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """From noise to a sample.

        Args:
            denoise: (x, t) -> x0, shapes and dtype of x; t is a Python float, the schedule's native time.
            x: (b, ...) noisy start in the schedule's coordinates, alpha x0 + sigma noise at the grid's first
                time;
                pure noise of standard deviation ``tableau.prior_std`` to begin from nothing.
            schedule: the noise schedule the network was trained on.
            steps: number of steps, ``default_steps`` when None.
            timesteps: explicit grid of native times, noisiest first; the last step then goes to the clean
                end,
                unless ``final="sigma_min"``, which makes the last entry the end.
            sigmas: the same grid as sigma / alpha ratios.
            generator: source of noise for stochastic samplers; a list holds one a sample, so that a sample
                does not
                depend on the batch it is drawn in.
            noise: () -> tensor like x, called once a noise term, in order; instead of ``generator``.
            callback: (step, x, x0) after every step, counted from 0.

        Returns:
            The sample, of x's shape and dtype: alpha x0 + sigma noise at the grid's end, x0 at the clean end.
        """
        if not x.is_floating_point():
            raise KitError(f"a sampler needs a floating-point x, not {x.dtype}")
        if noise is not None and generator is not None:
            raise KitError("give either noise or a generator, not both")
        tableau = self.tableau(schedule, steps, timesteps, sigmas)
        return tableau.run(denoise, x, noise or gaussian(x, generator), callback)


class _Plain(Schedule):
    """Schedule without limits, to count evaluations on."""

    name, t_min, t_max, domain = "plain", 1e-3, 1e3, (0.0, math.inf)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()


def gaussian(like: Tensor, generator: Generators | None = None) -> Noise:
    """A source of standard Gaussians of the shape of ``like``, in float32 or better.

    Args:
        like: (b, ...) tensor that gives shape, device and precision.
        generator: drawn from on its own device; a list holds one for every entry of the batch.

    Raises:
        KitError: a list of another length than the batch.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)

    def draw(shape: torch.Size, source: torch.Generator | None) -> Tensor:
        device = like.device if source is None else source.device
        return torch.randn(shape, generator=source, device=device, dtype=dtype).to(like.device)

    if generator is None or isinstance(generator, torch.Generator):
        return lambda: draw(like.shape, generator)
    each = list(generator)
    if len(each) != len(like):
        raise KitError(f"{len(each)} generators were given for a batch of {len(like)}; give one a sample")
    return lambda: torch.stack([draw(like.shape[1:], source) for source in each])

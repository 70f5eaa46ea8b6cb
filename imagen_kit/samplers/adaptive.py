"""DPM-Solver with an adaptive step size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers import grid as grids
from imagen_kit.samplers import register
from imagen_kit.samplers.asked import Asked
from imagen_kit.samplers.base import Sampler, begin
from imagen_kit.samplers.nonlinear import no_tableau
from imagen_kit.samplers.tableau import Callback, Denoise, Noise, Tableau, working_dtype
from imagen_kit.schedules.base import Schedule

#: Attempted steps after which a run is given up.
MOST = 10_000
#: Added to errors, so that a step without any does not divide by 0.
TINY = 1e-8


class _Place(NamedTuple):
    """Where every sample stands, (b,) each."""

    t: Tensor
    lam: Tensor
    alpha: Tensor
    sigma: Tensor


@register(
    "dpm_adaptive",
    order="2 or 3",
    stochastic="eta > 0",
    evaluations="order an attempted step, as many as the tolerances ask for",
    linear=False,
)
@dataclass(frozen=True, kw_only=True)
class DpmAdaptive(Sampler):
    """DPM-Solver-12 and -23 with adaptive steps (Lu et al. 2022a, Appendix C; k-diffusion's step control).

    Every step is made with two orders. With E the root mean square over a sample of
    (x_low - x_high) / max(atol, rtol max(|x_low|, |x_before|)), the next step is

        h · limit(E_0^-b1 E_1^-b2 E_2^-b3),  limit(f) = 1 + arctan(f - 1),

    E_0 being the newest error, E_1 and E_2 those of the last accepted steps, b1 = (p + i + d)/order,
    b2 = -(p + 2d)/order, b3 = d/order (a digital PID controller, Söderlind 2003). The step is accepted where
    that factor is at least ``accept_safety``.

    Every sample has its own step size and error, so that nothing depends on the batch; the network is asked
    for all samples until the last has arrived, and the host learns once an attempted step whether it has.

    ``steps`` says how long the first step is: a ``steps``-th of the way in lambda. Of an explicit grid only
    the ends and the number of steps count. A last evaluation leads to sigma = 0. It needs alpha > 0.

    Args:
        order: 3: second order controls third (three evaluations); 2: first controls second (two).
        rtol, atol: relative and absolute tolerance.
        p, i, d: coefficients of the controller.
        accept_safety: see above.
        eta: share of the noise drawn anew, as in ``euler_ancestral``; 0 is the ODE.
        s_noise: standard deviation of that noise.
    """

    name: ClassVar[str] = "dpm_adaptive"
    linear: ClassVar[bool] = False
    decides: ClassVar[bool] = True

    spacing: str = "log_snr"
    order: int = 3  # type: ignore[misc]
    rtol: float = 0.05
    atol: float = 0.0078
    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    accept_safety: float = 0.81
    eta: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (2, 3):
            raise KitError(f"sampler 'dpm_adaptive': option 'order' must be 2 or 3, not {self.order!r}")
        self._range("rtol", 0.0, math.inf)
        self._range("atol", 0.0, math.inf, open_low=True)
        for option in ("p", "i", "d", "s_noise"):
            self._range(option, 0.0, math.inf)
        # The limiter never goes under 1 - pi/4: there any error would be accepted.
        self._range("accept_safety", 1 - math.pi / 4, 1.0, open_low=True)
        self._range("eta", 0.0, 1.0)

    def trace(self, schedule: Schedule, points: list[grids.Point]) -> Tableau:
        raise no_tableau(self.name, "chooses its steps by what the network answers")

    def nfe(self, steps: int) -> NoReturn:
        """Always raises: the number of evaluations is known after a run only."""
        raise no_tableau(self.name, "takes as many evaluations as its tolerances ask for")

    def _sample(self, denoise: Denoise, x: Tensor, schedule: Schedule, asked: Asked) -> Tensor:
        if asked.nfe is not None:
            raise KitError("sampler 'dpm_adaptive' keeps to tolerances, not to nfe; give rtol and atol")
        rows = grids.each_sample(asked.timesteps, asked.sigmas, len(x) if x.ndim else 0)
        if rows is None:
            grid = [self.points(schedule, asked.steps, asked.timesteps, asked.sigmas)] * len(x)
        else:
            grid = [self.points(schedule, asked.steps, **{asked.which: row}) for row in rows]
        if any(points[0].alpha == 0 for points in grid):
            raise KitError(
                f"sampler 'dpm_adaptive' does not fit schedule {schedule.name!r} starting at "
                f"t={grid[0][0].t:g} (alpha = 0); try 'ddim'"
            )
        run = _Adaptive(self, schedule, grid, begin(denoise, _times(grid, x), asked.generator), x)
        state = run.run(x.to(working_dtype(x)), asked.noise, asked.callback)
        if grid[0][-1].sigma == 0:
            clean = grid[0][-1]
            state = clean.alpha * run.x0(state, run.place(run.end))
            if asked.callback is not None:
                asked.callback(run.attempts, state.to(x.dtype), state.to(x.dtype))
        return state.to(x.dtype)


class _Adaptive:
    """One run: the samples' places, step sizes and errors."""

    def __init__(
        self,
        sampler: DpmAdaptive,
        schedule: Schedule,
        grid: list[list[grids.Point]],
        denoise: Denoise,
        x: Tensor,
    ):
        self.sampler, self.schedule, self.denoise = sampler, schedule, denoise
        self.dtype, self.device = x.dtype, x.device
        self.shape = (-1, *(1,) * (x.ndim - 1))
        self.exact = torch.float32 if x.device.type == "mps" else torch.float64
        ends = [points[-2] if points[-1].sigma == 0 else points[-1] for points in grid]
        self.start = self.tensor([points[0].lam for points in grid])
        self.end = self.tensor([end.lam for end in ends])
        self.h = (self.end - self.start) / self.tensor([len(points) - 1.0 for points in grid])
        self.attempts = 0

    def tensor(self, values: list[float]) -> Tensor:
        """(b,) on the device, as exact as it can be."""
        return torch.tensor(values, dtype=self.exact, device=self.device)

    def run(self, x: Tensor, noise: Noise, callback: Callback | None) -> Tensor:
        """From the grid's start to its last place with noise; (b, ...) in the working dtype."""
        lam, before = self.start, x
        history = torch.zeros(2, len(x), dtype=self.exact, device=self.device)
        while self.underway(lam):
            left = lam < self.end
            target = torch.minimum(lam + self.h, self.end)
            low, high, x0, fresh = self.attempt(x, lam, target)
            inverse = 1 / (self.error(low, high, before) + TINY)
            if self.attempts == 0:  # the first error stands for those before it
                history = torch.stack([inverse, inverse])
            accepted, factor = self.control(inverse, history)
            history = torch.where(accepted, torch.stack([inverse, history[0]]), history)
            if self.sampler.eta > 0:
                high = high + self.times(fresh * self.sampler.s_noise, noise().to(high.dtype))
            taken = self.wide(accepted & left)
            x, before = torch.where(taken, high, x), torch.where(taken, low, before)
            lam = torch.where(accepted & left, target, lam)
            self.h = torch.where(left, self.h * factor, self.h)
            self.attempts += 1
            if callback is not None:
                callback(self.attempts - 1, x.to(self.dtype), x0.to(self.dtype))
        return x

    def underway(self, lam: Tensor) -> bool:
        """Whether a sample has not arrived; the one thing the host asks the device."""
        arrived, finite = torch.stack([(lam >= self.end).all(), self.h.isfinite().all()]).tolist()
        if not finite or self.attempts >= MOST:
            why = f"after {MOST} attempted steps" if finite else "since the network's answers are not finite"
            raise KitError(f"sampler 'dpm_adaptive' does not reach the end {why}; raise rtol and atol")
        return not arrived

    def control(self, inverse: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        """(which steps are accepted, what to multiply the step sizes with) from 1/E_0 and 1/E_1, 1/E_2."""
        s = self.sampler
        b1, b2, b3 = (s.p + s.i + s.d) / s.order, -(s.p + 2 * s.d) / s.order, s.d / s.order
        factor = 1 + torch.atan(inverse**b1 * history[0] ** b2 * history[1] ** b3 - 1)
        return factor >= s.accept_safety, factor

    def error(self, low: Tensor, high: Tensor, before: Tensor) -> Tensor:
        """(b,) how far the two orders lie apart, in tolerances."""
        scale = (self.sampler.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=self.sampler.atol)
        return ((low - high) / scale).to(self.exact).square().reshape(len(low), -1).mean(1).sqrt()

    def attempt(self, x: Tensor, lam: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(lower order, higher order, x0 at the start, weight of the noise) of a step from lam to target."""
        now, then = self.place(lam), self.place(target)
        share = self.sampler.eta**2 * -torch.expm1(2 * (lam - target))
        down = torch.minimum(target - 0.5 * torch.log1p(-share), self.end)
        fresh = then.sigma * (-torch.expm1(2 * (target - down))).clamp(min=0).sqrt()
        # the deterministic part ends with the noise of `down`, scaled as at the target
        then = then._replace(lam=down, sigma=then.sigma * (target - down).exp())
        x0 = self.x0(x, now)
        eps = self.noise(x, x0, now)
        part = 1 / self.sampler.order
        inner = self.first(x, eps, now, self.place(lam + part * (down - lam)))
        slope = (self.noise_at(inner, lam + part * (down - lam)) - eps) / part
        if self.sampler.order == 2:
            return self.first(x, eps, now, then), self.first(x, eps + slope / 2, now, then), x0, fresh
        low = self.first(x, eps + slope / 2, now, then)
        later = lam + 2 / 3 * (down - lam)
        inner = self.second(x, eps, 2 / 3 * slope, now, self.place(later))
        slope = (self.noise_at(inner, later) - eps) * 3 / 2
        return low, self.second(x, eps, slope, now, then), x0, fresh

    def first(self, x: Tensor, eps: Tensor, now: _Place, then: _Place) -> Tensor:
        """alpha'/alpha x - sigma' (e^h - 1) eps: DPM-Solver-1, and -2 with the noise of mid-step."""
        grown = then.sigma * torch.expm1(then.lam - now.lam)
        return self.times(then.alpha / now.alpha, x) - self.times(grown, eps)

    def second(self, x: Tensor, eps: Tensor, slope: Tensor, now: _Place, then: _Place) -> Tensor:
        """The same with the noise linear along the step and ``slope`` its change over it."""
        h = then.lam - now.lam
        weight = torch.where(h > 0, then.sigma * (torch.expm1(h) / h - 1), 0.0)
        return self.first(x, eps, now, then) - self.times(weight, slope)

    def noise_at(self, x: Tensor, lam: Tensor) -> Tensor:
        """The noise the network sees in x at a place."""
        at = self.place(lam)
        return self.noise(x, self.x0(x, at), at)

    def noise(self, x: Tensor, x0: Tensor, at: _Place) -> Tensor:
        """(x - alpha x0) / sigma."""
        return self.times(1 / at.sigma, x) - self.times(at.alpha / at.sigma, x0)

    def place(self, lam: Tensor) -> _Place:
        """The schedule's coefficients at (b,) values of lambda."""
        t = self.schedule.t_of_log_snr(2 * lam)
        alpha, sigma = (c.to(self.device, self.exact) for c in self.schedule.alpha_sigma(t))
        return _Place(t.to(self.device), lam, alpha, sigma)

    def times(self, weights: Tensor, x: Tensor) -> Tensor:
        """A weight (b,) for every sample of x (b, ...), in x's dtype."""
        return self.wide(weights).to(x.dtype) * x

    def wide(self, values: Tensor) -> Tensor:
        """(b,) → (b, 1, ...)."""
        return values.view(self.shape)

    def x0(self, x: Tensor, at: _Place) -> Tensor:
        """The network's x0 in the working dtype."""
        return self.denoise(x.to(self.dtype), at.t).to(x.dtype)


def _times(grid: list[list[grids.Point]], x: Tensor) -> Any:
    """The run's ends as native times, for guidance that goes by them."""
    ends = [[points[0].t, points[-1].t] for points in grid]
    return tuple(ends[0]) if all(end == ends[0] for end in ends) else torch.tensor(ends, device=x.device)

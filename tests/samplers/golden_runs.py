"""Playing a recorded run again: the network it had, what to play it with, and our states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from golden_data import SAME, Golden, UnknownRunError, load, unlimited
from torch import Tensor

from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form, Tableau

__all__ = [
    "Golden",
    "Misasked",
    "Network",
    "Plan",
    "Translator",
    "UnknownRunError",
    "error_of_our_own",
    "load",
    "replay",
    "replay_apart",
    "worst",
]


@dataclass(frozen=True)
class Network:
    """The recorded runs' network as our samplers call it, behind the run's limit on x0.

    ``with_variance`` gives the learned-range value that the runs of that kind were made with.
    """

    golden: Golden
    limit: Callable[[Tensor], Tensor] = unlimited

    def shown(self, x: Tensor, t: float, call: int) -> Tensor:
        """The state the peer shows its network, for our state x at our time t."""
        return outward(self.golden, x, self.golden.schedule.alpha_sigma(t)[0])

    def x0(self, x: Tensor, t: float, call: int) -> Tensor:
        """The unlimited x0 of the peer's ``call``, for our state x at our time t."""
        return self.golden.mixture(x, *self.golden.schedule.alpha_sigma(t))[0]

    def with_variance(self, x: Tensor, t: float, call: int) -> tuple[Tensor, Tensor]:
        return self.limit(self.x0(x, t, call)), 0.8 * torch.tanh(1.5 * x)


@dataclass(frozen=True)
class Misasked(Network):
    """The network of runs that do not ask it about the state, or the level, that the answer is used for.

    The peer asks about its state before it added something (``added``, by call and our level: churn), or
    tells the recorded level where its state is at another; it then takes the answer, of the run's prediction
    type, for one about its state.
    """

    added: Callable[[int, float], Tensor | float] | None = None

    def shown(self, x: Tensor, t: float, call: int) -> Tensor:
        alpha, sigma = self.golden.schedule.alpha_sigma(t)
        return x / alpha - (self.added(call, sigma / alpha) if self.added else 0.0)

    def x0(self, x: Tensor, t: float, call: int) -> Tensor:
        alpha, sigma = self.golden.schedule.alpha_sigma(t)
        state, level, asked = x / alpha, sigma / alpha, self.golden.levels[call]
        own = asked if self.added else level  # of the state that is shown
        shown = self.shown(x, t, call) * (1 + own**2) ** -0.5
        told = (1 + asked**2) ** -0.5
        x0, noise = self.golden.mixture(shown, told, asked * told)
        kind = self.golden.meta["prediction_type"]
        if kind == "sample":
            return x0
        if kind == "epsilon":
            return state - level * noise
        v = told * (noise - asked * x0)
        return state / (1 + own**2) - v * own * (1 + own**2) ** -0.5


@dataclass(frozen=True)
class Plan:
    """How a run is replayed.

    Attributes:
        sampler: ours; its ``final`` is set by the replay.
        points: of the grid, the end included; ``Golden.points`` where None.
        network: the run's network, limited as the run says.
        departs: why the peer's result is not that of its own method; the run is then judged against the
            exact solution instead (where there is one).
        noise_first: the sampler draws a step's noise before it asks the network.
        apart: the peer's grid does not hang together, but its steps are single: each is replayed on its own,
            from the recorded state, between these pairs of points.
    """

    sampler: Callable[..., Sampler]
    network: Network
    points: list[Point] | None = None
    departs: str = ""
    noise_first: bool = False
    apart: list[tuple[Point, Point]] | None = None


Translator = Callable[[Golden], Plan]


class _Watch:
    """What our sampler calls: a network that notes the states it is shown, in the peer's coordinates.

    ``parts`` gives the unlimited x0 as "uncond": some peers put back its noise, and limit x0 alone.
    """

    def __init__(self, golden: Golden, network: Network, first_call: int):
        self.golden, self.network, self.call = golden, network, first_call - 1
        self.states: list[Tensor] = []

    def _note(self, x: Tensor, t: float) -> None:
        self.call += 1
        self.states.append(self.network.shown(x, t, self.call))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self._note(x, t)
        return self.network.limit(self.network.x0(x, t, self.call))

    def parts(self, x: Tensor, t: float, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        assert names == ("uncond",)
        x0 = self(x, t)
        return x0, self.network.x0(x, t, self.call)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        self._note(x, t)
        return self.network.with_variance(x, t, self.call)


def outward(golden: Golden, x: Tensor, alpha: float) -> Tensor:
    """Our state in the peer's coordinates: variance-exploding peers keep x / alpha."""
    return x / alpha if golden.kind == "ve" else x


def replay(golden: Golden, plan: Plan) -> list[Tensor]:
    """Our states: those the network saw, in order, and the sample."""
    points = plan.points or golden.points()
    return _play(golden, plan, points, golden["x"][0], first_call=0)


def error_of_our_own(golden: Golden, plan: Plan) -> float:
    """Error of our run against the exact solution, where the peer's own is not what its method gives.

    The lesser of: the method on the recorded times; the method on as many steps of our spacings between the
    same ends, as a user would choose them (a grid that does not hang together may be lucky on its own times).
    """
    exact = golden["ode_final"]
    errors = [(replay(golden, plan)[-1] - exact).abs().max().item()]
    final = "zero" if golden.levels[-1] == 0 else "sigma_min"
    if (plan.points or golden.points())[0].t == golden.schedule.t_max:
        spacings = ("trailing", "linspace", "log_snr", "karras")
        for name in spacings:
            watch, sampler = _Watch(golden, plan.network, 0), plan.sampler(final=final, spacing=name)
            out = sampler.sample(watch, golden["x"][0], golden.schedule, golden.meta["steps"])
            errors.append((out - exact).abs().max().item())
    return min(errors)


def replay_apart(golden: Golden, plan: Plan) -> list[Tensor]:
    """Our state after every call, each from the recorded state before it."""
    assert plan.apart is not None
    pairs = enumerate(plan.apart)
    return [_play(golden, plan, [*pair], golden["x"][i], first_call=i)[-1] for i, pair in pairs]


def _play(golden: Golden, plan: Plan, points: list[Point], x: Tensor, first_call: int) -> list[Tensor]:
    watch = _Watch(golden, plan.network, first_call)
    drawn: dict[int, int] = {}

    def noise() -> Tensor:
        """The next Gaussian of the call the sampler is in; peers draw some that they do not use."""
        call = watch.call + plan.noise_first
        drawn[call] = drawn.get(call, 0) + 1
        return golden.noise_of_call(call)[drawn[call] - 1]

    start = x * points[0].alpha if golden.kind == "ve" else x
    sampler = plan.sampler(final="sigma_min" if points[-1].sigma else "zero")
    if points[-1].sigma and points[-1].ratio >= points[-2].ratio * (1 - SAME):
        # Our grids refuse a step of no length, so the formula is traced on the peer's points as they are.
        run = Run(golden.schedule, points)
        sampler.solve(Form({"x": 1.0}), run)
        tableau = Tableau(tuple(run.rows), 1, tuple(p.t for p in points), (0.0, 1.0), (1.0, 0.0), 1.0)
        out = tableau.run(watch, start, noise)
    else:
        times = [point.t for point in points if point.sigma]
        out = sampler.sample(watch, start, golden.schedule, timesteps=times, noise=noise)
    return [*watch.states, outward(golden, out, points[-1].alpha)]


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference of two lists of states; nan where there is one."""
    return (torch.stack(list(ours)) - torch.stack(list(theirs))).abs().max().item()

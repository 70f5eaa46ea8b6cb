"""What holds for every sampler on every schedule, spacing, number of steps and end: found by hypothesis.

Every case either gives a sound tableau or is refused with one line that says why; where it may be refused is
written down in ``may_refuse``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_oracles import EagerRun
from test_convergence import ROWS
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError
from imagen_kit.samplers.base import FINALS, Sampler
from imagen_kit.samplers.grid import SPACINGS, WHOLE_TIMES
from imagen_kit.samplers.step_lists import SECTIONS
from imagen_kit.samplers.tableau import Tableau
from imagen_kit.schedules.base import Schedule

DATA = analytic.problem("gmm2d")
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "scaled_linear": ("scaled_linear", {}),
    "linear of 60 times": ("linear", {"timesteps": 60, "beta_start": 1e-3, "beta_end": 0.2}),
    "zero terminal SNR": ("scaled_linear", {"zero_terminal_snr": True}),
    "cosine": ("cosine", {}),
    "shifted cosine": ("cosine", {"shift": 4.0}),
    "discrete cosine": ("cosine", {"timesteps": 1000}),
    "sigmoid": ("sigmoid", {}),
    "edm": ("edm", {}),
    "flow": ("flow", {}),
    "shifted flow": ("flow", {"shift": 3.0}),
    "flow from pure noise": ("flow", {"t_max": 1.0}),
}
LINEAR = [name for name in samplers.names() if samplers.describe(name).get("linear", True)]
#: Options to try beside the defaults, by sampler.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddpm": [{"variance": "fixed_large"}, {"variance": 0.3}],
    "ddim": [{"eta": 1.0}, {"renoise": "uncond"}],
    "euler": [{"renoise": "uncond"}],
    "euler_ancestral": [{"renoise": "uncond"}],
    "dpmpp_2m": [{"renoise": "uncond"}],
    "flow_euler": [{"stochastic_sampling": True}],
    "dpmpp_2s": [{"eta": 1.0}],
    "dpmpp_3s": [{"eta": 1.0}],
    "er_sde": [{"scale": name} for name in ("sde", "er1", "er2", "er3", "er4", "er5")],
    "sa_solver": [{"predictor_order": 3, "corrector_order": 4}, {"expands": "noise"}, {"weights": "exact"}],
    "restart": [{"intervals": [[3, 2, 0.2, 1.0]], "solver": "euler"}],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting of everything a tableau depends on."""

    options: dict[str, Any]
    schedule: str
    spacing: str
    final: str
    steps: int


@cache
def schedule_of(name: str) -> Schedule:
    kind, options = SCHEDULES[name]
    return schedules.create(kind, **options)


def cases(name: str, most: int = 50) -> st.SearchStrategy[Case]:
    rows = [row.options for row in ROWS.get(name, ())]
    return st.builds(
        Case,
        options=st.sampled_from([{}, *OPTIONS.get(name, ()), *rows]),
        schedule=st.sampled_from(list(SCHEDULES)),
        spacing=st.sampled_from(sorted(set(SPACINGS) - set(SECTIONS))),  # lists have a length of their own
        final=st.sampled_from(FINALS),
        steps=st.integers(1, most),
    )


def examples(count: int) -> Callable[[Any], Any]:
    """Bounded and the same in every run; what an example costs depends on its number of steps."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def may_refuse(sampler: Sampler, schedule: Schedule, case: Case) -> bool:
    """Whether this case is one that cannot be: more steps than times, or a start without signal."""
    closed = case.final == "sigma_min"
    scarce = schedule.discrete and case.steps > schedule.discrete - closed and case.spacing in WHOLE_TIMES
    return bool(scarce) or schedule.alpha_sigma(schedule.t_max)[0] == 0


def traced(name: str, case: Case) -> tuple[Sampler, Schedule, Tableau] | None:
    """The case's tableau, or None where it is rightly refused."""
    schedule = schedule_of(case.schedule)
    sampler = samplers.create(name, spacing=case.spacing, final=case.final, **case.options)
    try:
        return sampler, schedule, sampler.tableau(schedule, case.steps)
    except KitError as error:
        refusal = str(error)
    assert may_refuse(sampler, schedule, case), refusal
    assert "\n" not in refusal
    assert name in refusal or "steps must be" in refusal
    return None


class Mixture:
    """The ideal network of a mixture, with the answer a guided sampler asks for as well."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        return DATA.x0(x, *self.schedule.alpha_sigma(t))

    def parts(self, x: Tensor, t: float | Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        return self(x, t), *(0.9 * self(x, t) for _ in names)


def noises(like: Tensor, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def start(tableau: Tableau, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return tableau.prior_std * torch.randn(batch, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LINEAR)
def test_tableaus_are_sound(name: str) -> None:
    """Finite weights, strictly falling noise, every step ended once, the end asked for, no slot before its time."""

    @examples(25)
    @given(case=cases(name))
    def check(case: Case) -> None:
        found = traced(name, case)
        if found is None:
            return
        sampler, schedule, tableau = found
        points = sampler.points(schedule, case.steps)
        assert len(points) == len(tableau.times) == case.steps + 1
        assert all(after.lam > before.lam for before, after in pairwise(points))
        if case.final == "zero":
            assert tableau.end == (1.0, 0.0)
        else:
            assert tableau.end[1] > 0
            assert tableau.times[-1] == schedule.t_min
        filled, ended, drawn = {"x"}, [], set[str]()
        for row in tableau.rows:
            used = dict(row.weights)
            assert all(math.isfinite(weight) for weight in used.values())
            fresh = {slot for slot in used if slot.startswith("n")} - drawn
            assert set(used) - {row.state} <= filled | fresh
            drawn |= fresh
            filled |= {row.state, *row.outputs} | fresh
            ended += [row.step] if row.step is not None else []
            if row.t is not None:
                assert schedule.domain[0] <= row.t <= schedule.domain[1]
        assert ended == list(range(case.steps))
        assert tableau.rows[-1].step == case.steps - 1
        assert case.steps <= tableau.nfe

    check()


@pytest.mark.parametrize("name", LINEAR)
def test_the_tableau_is_the_eager_formula(name: str) -> None:
    """Every state of a run equals the formula computed on tensors, step by step."""

    @examples(8)
    @given(case=cases(name, most=30))
    def check(case: Case) -> None:
        found = traced(name, case)
        if found is None:
            return
        sampler, schedule, tableau = found
        x, network = start(tableau), Mixture(schedule)
        eager = EagerRun(schedule, sampler.points(schedule, case.steps), network, noises(x))
        sampler.solve(x, eager)  # type: ignore[arg-type]
        states = [state for _, state, _ in tableau.iterate(network, x, noises(x))]
        assert len(states) == len(eager.states) == case.steps
        # Terms that cancel leave the rounding of the largest: weight times state.
        largest = max(abs(weight) for row in tableau.rows for _, weight in row.weights)
        scale = max(1.0, *(state.abs().max().item() for state in (x, *states))) * max(1.0, largest)
        for got, want in zip(states, eager.states, strict=True):
            assert (got - want).abs().max().item() < 1e-12 * scale

    check()


def interleaved(*runs: Iterator[tuple[int, Tensor, Tensor]]) -> list[Tensor]:
    """The last states of runs that take turns, one step each."""
    last: list[Tensor] = []
    for turns in zip(*runs, strict=True):
        last = [state for _, state, _ in turns]
    return last


@pytest.mark.parametrize("name", LINEAR)
def test_runs_share_nothing(name: str) -> None:
    """Two interleaved runs, and a third after them, are what each is alone; nothing about the sampler changes."""

    @examples(4)
    @given(case=cases(name, most=12))
    def check(case: Case) -> None:
        found = traced(name, case)
        if found is None:
            return
        sampler, schedule, tableau = found
        before = repr(sampler), str(tableau)
        network = Mixture(schedule)
        xs = [start(tableau, seed=seed) for seed in (0, 1)]
        alone = [tableau.run(network, x, noises(x, seed)) for seed, x in enumerate(xs)]
        kept = [x.clone() for x in xs]
        together = interleaved(
            *(tableau.iterate(network, x, noises(x, seed)) for seed, x in enumerate(xs)),
        )
        again = sampler.sample(network, xs[0], schedule, case.steps, noise=noises(xs[0], 0))
        assert torch.equal(together[0], alone[0])
        assert torch.equal(together[1], alone[1])
        assert torch.equal(again, alone[0])
        assert all(torch.equal(x, copy) for x, copy in zip(xs, kept, strict=True))
        assert (repr(sampler), str(tableau)) == before
        assert sampler == dataclasses.replace(sampler)

    check()


@pytest.mark.parametrize("name", samplers.names())
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """With a generator a sample, a batch of three is three batches of one."""

    @examples(4)
    @given(case=cases(name, most=12))
    def check(case: Case) -> None:
        schedule = schedule_of(case.schedule)
        if may_refuse(samplers.create("ddim"), schedule, case):
            return
        sampler = samplers.create(name, spacing=case.spacing, final=case.final, **case.options)
        network = Mixture(schedule)
        first = sampler.points(schedule, case.steps)[0]
        x = schedule.prior_std(first.t) * torch.randn(
            3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

        def draw(part: slice) -> Tensor:
            sources = [torch.Generator().manual_seed(seed) for seed in range(3)][part]
            return sampler.sample(network, x[part], schedule, case.steps, generator=sources)

        together = draw(slice(None))
        alone = torch.cat([draw(slice(i, i + 1)) for i in range(3)])
        # sums over a batch of another size may be vectorised otherwise; 80 is the largest state
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)

    check()


@pytest.mark.parametrize("name", samplers.names())
def test_samplers_are_immutable(name: str) -> None:
    sampler = samplers.create(name)
    assert dataclasses.is_dataclass(sampler)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.spacing = "linspace"
    assert hash(sampler) == hash(samplers.create(name))

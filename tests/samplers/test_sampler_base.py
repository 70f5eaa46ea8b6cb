"""Options, errors and sources of noise common to all samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_oracles import gaussian_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.tableau import Form

FLOW = schedules.create("flow")
X = torch.zeros(2, 3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4"])
def test_steps_must_be_whole_and_positive(steps: Any) -> None:
    with pytest.raises(KitError, match="steps must be a whole number of at least 1, not"):
        samplers.create("ddim").tableau(FLOW, steps)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("ddim", {"spacing": "karas"}, "unknown spacing 'karas'; did you mean 'karras'"),
        ("ddim", {"final": "sigma_mn"}, "unknown final 'sigma_mn'; did you mean 'sigma_min'"),
        ("ddim", {"eta": 1.5}, "'eta' must be a number from 0 to 1, not 1.5"),
        ("ddim", {"eta": "high"}, "'eta' must be a number"),
        ("ddim", {"offset": -1}, "'offset' must be a whole number"),
        ("ddim", {"rho": 0.0}, "'rho' must be a number above 0"),
        ("ddim", {"etaa": 0.0}, "no option 'etaa'; did you mean 'eta'"),
        ("euler_ancestral", {"eta": -1}, "'eta' must be a number from 0 to 1"),
        ("dpmpp_2m", {"kind": "heum"}, "did you mean 'heun'"),
        ("dpmpp_2s", {"kind": "midpiont"}, "did you mean 'midpoint'"),
        ("dpmpp_3m", {"curvature": "exakt"}, "did you mean 'exact'"),
        ("dpmpp_2m_sde", {"eta": -0.1}, "'eta' must be a number from 0"),
        ("ddpm", {"variance": "fixed_smal"}, "'fixed_small', 'fixed_large', .* or a number from 0 to 1"),
        ("ddpm", {"variance": 2.0}, "'variance' must be a number from 0 to 1"),
    ],
)
def test_bad_options_are_told_in_one_line(name: str, options: dict[str, Any], rule: str) -> None:
    with pytest.raises(KitError, match=rule) as caught:
        samplers.create(name, **options)
    assert "\n" not in str(caught.value)


def test_steps_and_an_explicit_grid_must_agree() -> None:
    sampler = samplers.create("ddim")
    assert sampler.tableau(FLOW, 2, timesteps=[0.9, 0.5]).nfe == 2
    with pytest.raises(KitError, match="the given grid has 2 steps, not 3"):
        sampler.tableau(FLOW, 3, timesteps=[0.9, 0.5])


def test_default_steps() -> None:
    assert samplers.create("dpmpp_2m").tableau(FLOW).nfe == 20
    assert samplers.create("ddpm").tableau(FLOW).nfe == 250


def test_what_a_sampler_is_given_must_make_sense() -> None:
    sampler = samplers.create("ddim", eta=1.0)
    with pytest.raises(KitError, match=r"floating-point x, not torch\.int64"):
        sampler.sample(lambda x, t: x, torch.zeros(2, dtype=torch.int64), FLOW, 2)
    with pytest.raises(KitError, match="either noise or a generator"):
        sampler.sample(lambda x, t: x, X, FLOW, 2, noise=lambda: X, generator=torch.Generator())
    with pytest.raises(KitError, match="3 generators were given for a batch of 2"):
        sampler.sample(lambda x, t: x, X, FLOW, 2, generator=[torch.Generator()] * 3)


def test_a_generator_decides_the_sample() -> None:
    sampler = samplers.create("euler_ancestral")

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampler.sample(gaussian_denoiser(FLOW, 0.0, 1.0), X, FLOW, 4, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_the_callback_sees_every_step() -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    out = samplers.create("heun").sample(
        gaussian_denoiser(FLOW, 0.3, 1.0),
        torch.ones(1, 2),
        FLOW,
        4,
        callback=lambda step, x, x0: seen.append((step, x)),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], out)


def test_prior_std_is_what_sampling_starts_from() -> None:
    assert samplers.create("ddim").tableau(schedules.create("edm"), 3).prior_std == 80.0
    assert samplers.create("ddim").tableau(schedules.create("linear"), 3).prior_std == 1.0
    assert samplers.create("ddim").tableau(FLOW, 3).prior_std == pytest.approx(0.999)


def test_heun_does_not_fit_a_flow_at_one() -> None:
    with pytest.raises(
        KitError, match=r"sampler 'heun' does not fit schedule 'flow' starting at t=1 \(alpha = 0\)"
    ):
        samplers.create("heun").tableau(FLOW, timesteps=[1.0, 0.5])
    assert samplers.create("euler").tableau(FLOW, timesteps=[1.0, 0.5]).nfe == 2


@pytest.mark.parametrize(
    ("name", "options", "nfe", "steps"),
    [
        ("ddim", {}, 7, 7),
        ("heun", {}, 7, 4),  # 2 · 4 - 1
        ("heun", {}, 8, 4),
        ("heun", {"final": "sigma_min"}, 7, 3),
        ("dpmpp_sde", {}, 20, 10),
        ("plms", {}, 10, 9),
    ],
)
def test_a_budget_of_evaluations(name: str, options: dict[str, Any], nfe: int, steps: int) -> None:
    sampler = samplers.create(name, **options)
    schedule = schedules.create("scaled_linear")
    tableau = sampler.tableau(schedule, nfe=nfe)
    assert tableau is sampler.tableau(schedule, steps)
    assert tableau.nfe <= nfe < sampler.tableau(schedule, steps + 1).nfe
    calls: list[float] = []

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return x * 0.5

    sampler.sample(denoise, X, schedule, nfe=nfe)
    assert len(calls) == tableau.nfe


def test_a_budget_beyond_the_schedules_times_takes_them_all() -> None:
    schedule = schedules.create("linear", timesteps=20)
    assert samplers.create("ddim").tableau(schedule, nfe=50).nfe == 20


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"nfe": 0}, "nfe must be a whole number of at least 1, not 0"),
        ({"nfe": 2.5}, "nfe must be a whole number"),
        ({"nfe": True}, "nfe must be a whole number"),
        ({"nfe": 5, "steps": 5}, "give nfe, or steps, or a grid"),
        ({"nfe": 5, "timesteps": [0.9, 0.5]}, "give nfe, or steps, or a grid"),
        ({"nfe": 1}, "sampler 'heun' takes 2 evaluations for one step; nfe=1 is less"),
    ],
)
def test_budgets_that_cannot_be(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(KitError, match=rule):
        samplers.create("heun", final="sigma_min").tableau(FLOW, **arguments)


def test_tableaus_are_remembered_by_what_they_are_made_of() -> None:
    sampler, other = samplers.create("ddim", eta=0.5), schedules.create("flow")
    first = sampler.tableau(FLOW, 5)
    assert samplers.create("ddim", eta=0.5).tableau(FLOW, 5) is first
    assert sampler.tableau(other, 5) is not first
    assert sampler.tableau(other, 5) == first
    assert samplers.create("ddim", eta=0.25).tableau(FLOW, 5) != first
    assert samplers.create("ddim", eta=0.5, final="sigma_min").tableau(FLOW, 5) != first
    assert samplers.create("euler").tableau(FLOW, 5).sampler == "euler"
    same = torch.tensor([0.9, 0.5], dtype=torch.float64)
    assert sampler.tableau(FLOW, timesteps=[0.9, 0.5]) is sampler.tableau(FLOW, timesteps=same)
    with pytest.raises(KitError, match="steps must be a whole number"):
        sampler.tableau(FLOW, True)  # 1 to a dict, and no number of steps


def test_a_schedule_that_cannot_be_a_key_is_traced_every_time() -> None:
    class Unhashable(type(FLOW)):  # type: ignore[misc]
        __hash__ = None  # type: ignore[assignment]

    sampler, schedule = samplers.create("ddim"), Unhashable()
    assert sampler.tableau(schedule, 5) is not sampler.tableau(schedule, 5)
    assert sampler.tableau(schedule, 5).rows == sampler.tableau(schedules.create("flow"), 5).rows


def test_a_kept_state_is_one_slot_later() -> None:
    class Corrected(Sampler):
        name = "corrected"

        def solve(self, x: Form, run: Run) -> Form:
            for _, now, _then in run.steps:
                answer = run.denoise(x, now)
                kept = run.keep(0.5 * x + 0.25 * answer)
                assert run.keep(kept) is kept
                x = run.step(kept + answer)
            return x

    rows = Corrected().tableau(FLOW, 2).rows
    assert [row.state for row in rows] == ["x", "s1", "s2", "s3", "s4"]
    assert rows[1].weights == (("x", 0.5), ("d0", 0.25))
    assert rows[2].weights == (("s1", 1.0), ("d0", 1.0))
    assert [row.step for row in rows] == [None, None, 0, None, 1]


def test_what_nothing_reads_is_not_computed() -> None:
    class Wasteful(Sampler):
        name = "wasteful"

        def solve(self, x: Form, run: Run) -> Form:
            for _, now, _then in run.steps:
                answer = run.denoise(x, now)
                run.keep(run.keep(0.5 * x + run.noise()) + answer)
                x = run.step(answer * 1.0 + 0.25 * x)
            return x

    tableau = Wasteful().tableau(FLOW, 2)
    assert [row.step for row in tableau.rows] == [None, 0, 1]
    assert tableau.noises == 0

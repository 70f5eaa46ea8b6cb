"""DDPM's variances, fixed and learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_kit import denoise_fn, samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.ddpm import variances
from imagen_kit.samplers.grid import Point

SCHEDULE = schedules.create("cosine", timesteps=1000)
TIMES = [999.0, 700.0, 350.0, 20.0]
NOISES = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Learned:
    """A network with a second half of channels, as samplers see it."""

    def __init__(self, said: Callable[[Tensor], Tensor]):
        self.said = said

    def with_variance(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        return torch.tanh(x), self.said(x)


def run(variance: Any, denoise: Any, final: str = "zero", **arguments: Any) -> Tensor:
    sampler = samplers.create("ddpm", variance=variance, final=final)
    given = {"timesteps": TIMES, "noise": iter(NOISES).__next__, **arguments}
    return sampler.sample(denoise, NOISES[4], SCHEDULE, **given)


def plain(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(final: str) -> None:
    for value, name in ((-1.0, "fixed_small"), (1.0, "fixed_large"), (0.0, 0.5), (-0.4, 0.3)):
        learned = run("learned_range", Learned(lambda x, v=value: torch.full_like(x, v)), final)
        torch.testing.assert_close(learned, run(name, plain, final), rtol=0, atol=1e-12)


def test_learned_range_step_by_step() -> None:
    """Nichol & Dhariwal 2021, eq. 15, with betas of the respaced chain (guided-diffusion, IF)."""
    alphas = [SCHEDULE.alpha_sigma(t)[0] ** 2 for t in TIMES] + [1.0]
    x = NOISES[4]
    for i, noise in enumerate(NOISES[:4]):
        bar, bar_then = alphas[i], alphas[i + 1]
        beta = 1 - bar / bar_then
        small = (1 - bar_then) / (1 - bar) * beta
        mean = math.sqrt(bar_then) * beta / (1 - bar) * torch.tanh(x)
        mean = mean + math.sqrt(1 - beta) * (1 - bar_then) / (1 - bar) * x
        if bar_then < 1:
            share = (torch.sin(3 * x) + 1) / 2
            mean = mean + (0.5 * (share * math.log(beta) + (1 - share) * math.log(small))).exp() * noise
        x = mean
    got = run("learned_range", Learned(lambda x: torch.sin(3 * x)))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


def test_a_learned_variance_is_taken_as_it_is() -> None:
    """``learned``: the network says the log variance. Saying the posterior's is fixed_small."""
    points = [Point(t, *SCHEDULE.alpha_sigma(t)) for t in TIMES]
    logs = iter([math.log(variances(*pair)[0]) for pair in itertools.pairwise(points)] + [0.0])
    got = run("learned", Learned(lambda x: torch.full_like(x, next(logs))))
    torch.testing.assert_close(got, run("fixed_small", plain), rtol=0, atol=1e-12)


def test_a_network_of_twice_the_channels() -> None:
    """Through ``denoise_fn``: the second half of the channels is v, the first half the noise."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.3 * x, torch.ones_like(x)], 1)

    denoise = denoise_fn(network, SCHEDULE)
    draws = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [
        samplers.create("ddpm", variance=variance).sample(
            denoise, x, SCHEDULE, timesteps=TIMES, noise=iter(draws).__next__
        )
        for variance in ("learned_range", "fixed_large")
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_grid_for_every_sample() -> None:
    learned = Learned(lambda x: torch.sin(3 * x))
    grids = torch.tensor([TIMES, [900.0, 500.0, 200.0, 5.0], TIMES], dtype=torch.float64)
    whole = run("learned_range", learned, timesteps=grids)
    sampler = samplers.create("ddpm", variance="learned_range")
    for i in range(3):
        draws = iter(NOISES[:, i : i + 1])
        one = sampler.sample(
            learned, NOISES[4, i : i + 1], SCHEDULE, timesteps=grids[i], noise=draws.__next__
        )
        torch.testing.assert_close(whole[i : i + 1], one, rtol=0, atol=1e-14)


def test_budgets_and_runs_of_guidance() -> None:
    """nfe= counts as with a fixed variance; ``begin`` of the wrapped function starts every run."""
    began: list[Sequence[float]] = []

    class Beginning(Learned):
        def begin(self, times: Sequence[float], generator: Any, parts: Sequence[str]) -> Learned:
            began.append(times)
            assert generator is source
            return self

    sampler = samplers.create("ddpm", variance="learned_range")
    assert sampler.nfe(7) == 7
    assert sampler.steps_for(7) == 7
    source, steps = torch.Generator().manual_seed(0), []
    sampler.sample(
        Beginning(torch.sin), NOISES[4], SCHEDULE, nfe=6, generator=source,
        callback=lambda i, x, x0: steps.append(i),
    )  # fmt: skip
    assert steps == list(range(6))
    assert len(began) == 1
    assert len(began[0]) == 7


def test_it_says_when_it_has_no_tableau() -> None:
    for variance in ("learned_range", "learned"):
        sampler = samplers.create("ddpm", variance=variance)
        assert not sampler.linear
        with pytest.raises(KitError, match=r"'ddpm' with variance='learned.*it has no tableau"):
            sampler.tableau(SCHEDULE, 4)
        with pytest.raises(NotImplementedError):
            sampler.tableau(SCHEDULE, 4)
    assert samplers.create("ddpm").linear
    assert "learned" in samplers.describe("ddpm")["linear"]


def test_a_network_without_a_variance() -> None:
    with pytest.raises(
        KitError, match=r"needs a denoiser with a learned variance.*use variance='fixed_small'"
    ):
        run("learned_range", plain)
    denoise = denoise_fn(lambda x, t: x, SCHEDULE)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(KitError, match="the network has no learned variance"):
        samplers.create("ddpm", variance="learned_range").sample(denoise, x, SCHEDULE, 3)

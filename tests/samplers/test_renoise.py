"""CFG++: the noise that is put back is the unconditional prediction's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
COSINE = schedules.create("cosine")
NOISES = torch.randn(20, 6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Guided:
    """Two predictions of x0: a guided one, and the unconditional ``pull`` away from it."""

    def __init__(self, pull: float):
        self.pull = pull
        self.plain = mixture_denoiser(COSINE)

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self.plain(x, t)

    def parts(self, x: torch.Tensor, t: float, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        assert names == ("uncond",)
        return self(x, t), self(x, t) + self.pull


def run(name: str, pull: float, steps: int = 5, **options: Any) -> torch.Tensor:
    noises = iter(NOISES[1:])
    sampler = samplers.create(name, spacing="trailing", **options)
    return sampler.sample(Guided(pull), NOISES[0], COSINE, steps, noise=noises.__next__)


@pytest.mark.parametrize("name", SAMPLERS)
def test_equal_predictions_make_no_difference(name: str) -> None:
    assert same(run(name, 0.0, renoise="uncond"), run(name, 0.0))
    assert not same(run(name, 0.5, renoise="uncond"), run(name, 0.5))
    assert same(run(name, 0.5), run(name, 0.0))  # without the option nobody asks for the other prediction


@pytest.mark.parametrize(
    ("name", "options"), [("ddim", {}), ("ddim", {"eta": 0.6}), ("euler", {}), ("dpmpp_2m", {})]
)
def test_a_step_is_the_formula(name: str, options: dict[str, Any]) -> None:
    """Between two times the difference is that of the noise kept: - kept alpha / sigma · (uncond - x0)."""
    sampler = samplers.create(name, final="sigma_min", **options)
    plain, other = (
        samplers.create(name, final="sigma_min", renoise=renoise, **options).sample(
            Guided(0.25), NOISES[0], COSINE, timesteps=[0.8, 0.5], noise=lambda: NOISES[1]
        )
        for renoise in ("guided", "uncond")
    )
    now, then = sampler.points(COSINE, timesteps=[0.8, 0.5])
    share = options.get("eta", 0.0) ** 2 * (1 - (then.ratio / now.ratio) ** 2)
    kept = then.sigma * (1 - share) ** 0.5
    torch.testing.assert_close(other, plain - kept * now.alpha / now.sigma * 0.25, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_evaluation_gives_both(name: str) -> None:
    tableau = samplers.create(name, renoise="uncond").tableau(COSINE, 5)
    assert tableau.nfe == 5
    assert all(row.also == ("uncond",) for row in tableau.rows if row.t is not None)


def test_a_denoiser_of_one_prediction_is_refused() -> None:
    with pytest.raises(KitError, match="'ddim' with renoise='uncond' needs a guided denoiser"):
        sample("ddim", renoise="uncond")


@pytest.mark.parametrize("name", SAMPLERS)
def test_sources_are_checked(name: str) -> None:
    with pytest.raises(KitError, match="unknown renoise 'uncod'; did you mean 'uncond'"):
        samplers.create(name, renoise="uncod")

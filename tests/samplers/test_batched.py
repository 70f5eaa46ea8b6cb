"""A grid for every sample of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_oracles import gaussian_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

SCHEDULE = schedules.create("cosine")
GRIDS = [[0.95, 0.7, 0.5, 0.3, 0.1], [0.8, 0.6, 0.55, 0.2, 0.15], [0.95, 0.7, 0.5, 0.3, 0.1]]
X = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LINEAR = [name for name in samplers.names() if samplers.describe(name)["linear"]]
#: Of their own grid's making: which steps get noise or a restart depends on the times.
BY_TIME = ("edm", "restart")


def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Gaussian data; t a float, or (b,)."""
    if isinstance(t, torch.Tensor):
        assert t.shape == (len(x),)
        assert t.dtype == torch.float64
        return torch.stack(
            [gaussian_denoiser(SCHEDULE, 0.2, 0.6)(row, u) for row, u in zip(x, t.tolist(), strict=True)]
        )
    return gaussian_denoiser(SCHEDULE, 0.2, 0.6)(x, t)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(len(X))]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", [name for name in LINEAR if name not in BY_TIME])
def test_every_sample_follows_its_own_grid(name: str, final: str) -> None:
    sampler = samplers.create(name, final=final)
    together = sampler.sample(denoise, X, SCHEDULE, timesteps=torch.tensor(GRIDS), generator=generators())
    apart = [
        sampler.sample(denoise, X[i : i + 1], SCHEDULE, timesteps=torch.tensor(grid).tolist(), generator=[g])
        for i, (grid, g) in enumerate(zip(GRIDS, generators(), strict=True))
    ]
    # Sums in another order, with weights up to 1e2.
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-11, atol=1e-11)


def test_ratios_can_be_every_samples_own() -> None:
    sampler = samplers.create("dpmpp_2m")
    ratios = [[9.0, 1.0], [5.0, 0.5], [5.0, 0.5]]
    together = sampler.sample(denoise, X, SCHEDULE, sigmas=ratios)  # type: ignore[arg-type]
    apart = [sampler.sample(denoise, X[i : i + 1], SCHEDULE, sigmas=row) for i, row in enumerate(ratios)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


def test_equal_grids_are_one() -> None:
    """The network is then told a float, as for a single grid."""
    told: list[Any] = []

    def record(x: torch.Tensor, t: Any) -> torch.Tensor:
        told.append(t)
        return denoise(x, t)

    sampler = samplers.create("euler")
    one = sampler.sample(record, X, SCHEDULE, timesteps=GRIDS[0])
    assert torch.equal(sampler.sample(record, X, SCHEDULE, timesteps=[GRIDS[0]] * 3), one)  # type: ignore[arg-type]
    assert all(isinstance(t, float) for t in told)


def test_narrow_states_and_callbacks() -> None:
    seen: list[int] = []
    out = samplers.create("euler_ancestral").sample(
        lambda x, t: x * 0.5,
        X.bfloat16(),
        SCHEDULE,
        timesteps=torch.tensor(GRIDS),
        callback=lambda step, x, x0: seen.append(step),
    )
    assert out.dtype == torch.bfloat16
    assert out.shape == X.shape
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sampler", "grid", "rule"),
    [
        ("ddim", [[0.9, 0.5]] * 2, "timesteps holds 2 grids for a batch of 3; give one, or one a sample"),
        ("ddim", [[0.9, 0.5], [0.9], [0.5]], "timesteps holds grids of different lengths"),
        ("ddim", [[0.9, 0.5], [0.5, 0.9], [0.9, 0.5]], "fall strictly"),
        ("ddim", [[0.9, 0.5], [0.9, 0.0], [0.9, 0.5]], "does not take the same course on these grids"),
        ("ddim", [["a", "b"]] * 3, "timesteps must be a row of numbers"),
    ],
)
def test_grids_that_cannot_be(sampler: str, grid: Any, rule: str) -> None:
    with pytest.raises(KitError, match=rule) as caught:
        samplers.create(sampler).sample(denoise, X, SCHEDULE, timesteps=grid)
    assert "\n" not in str(caught.value)


def test_a_tableau_has_one_grid() -> None:
    with pytest.raises(KitError, match="timesteps must be a row of numbers"):
        samplers.create("ddim").tableau(SCHEDULE, timesteps=torch.tensor(GRIDS))

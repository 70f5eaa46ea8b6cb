"""Sources of noise."""

from __future__ import annotations

import pytest
import torch

from imagen_kit.errors import KitError
from imagen_kit.samplers.noise import gaussian


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)]


def test_noise_is_standard_and_per_sample() -> None:
    draw = gaussian(torch.zeros(3, 20_000, dtype=torch.bfloat16), generators())
    first, second = draw(), draw()
    assert first.dtype == torch.float32  # drawn fine, added in float32, rounded once
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    # 20,000 draws: standard error of the mean 0.007, of the deviation 0.005
    assert first.mean(1).abs().max() < 0.03
    assert (first.std(1) - 1).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 11)])
def test_filling_and_drawing_give_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros(shape, dtype=dtype)
    for make in (generators, lambda: generators()[0]):
        drawn, filled = gaussian(like, make()), gaussian(like, make())
        out = torch.empty(shape, dtype=dtype)
        for _ in range(3):
            filled.fill_(out)
            assert torch.equal(drawn(), out)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(KitError, match="3 generators were given for a batch of 2; give one a sample"):
        gaussian(torch.zeros(2, 3), generators())

from __future__ import annotations

import numpy as np
import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.errors import KitError
from imagen_kit.guidance.dynamic_threshold import quantile

FLOW = schedules.create("flow")


def threshold(x, **options):
    strategy = guidance.create("dynamic_threshold", **options)
    return denoise_fn(lambda x, t: x, FLOW, "x0", guidance=strategy)(x, 0.5)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.95, 0.995, 0.99999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 48, 1000])
def test_quantiles_agree_with_numpy(fraction, n):
    values = np.random.default_rng(n).normal(size=(3, n))
    ours = quantile(torch.from_numpy(values), fraction).numpy()
    # float64 interpolation of two neighbours
    assert np.allclose(ours, np.quantile(values, fraction, axis=1), atol=1e-12)


def test_more_values_than_torch_quantile_takes():
    values = torch.arange(17 * 2**20, dtype=torch.float32).reshape(1, -1)
    # above 2^24 float32 holds even integers only
    assert quantile(values, 1.0).item() == pytest.approx(17 * 2**20 - 1, abs=1)


def test_the_papers_rule_sample_by_sample():
    scales = torch.tensor([0.5, 2.0, 6.0]).reshape(-1, 1, 1, 1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scales
    got = threshold(x, percentile=0.9)
    for one, out in zip(x.numpy(), got.numpy(), strict=True):
        s = max(np.quantile(np.abs(one), 0.9), 1.0)
        assert np.allclose(out, np.clip(one, -s, s) / s, atol=1e-12)  # float64 rounding
    assert torch.equal(got[0].abs() > 1, torch.zeros_like(got[0], dtype=torch.bool))


def test_a_picture_inside_the_range_is_left_as_it_is():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(threshold(x), x)


def test_cap_1_is_static_thresholding_and_a_high_cap_none():
    x = 4 * torch.randn(2, 3, 8, 8)
    assert torch.equal(threshold(x, cap=1.0), x.clamp(-1, 1))
    assert torch.equal(threshold(x, cap=1e6), threshold(x))
    capped = threshold(x, cap=1.5)
    assert torch.allclose(capped, x.clamp(-1.5, 1.5) / 1.5, atol=1e-6)  # float32 rounding


def test_a_sample_does_not_depend_on_its_neighbours():
    x = 3 * torch.randn(4, 3, 8, 8)
    whole = threshold(x)
    assert torch.equal(torch.cat([threshold(x[i : i + 1]) for i in range(4)]), whole)
    assert torch.equal(threshold(x.flip(0)).flip(0), whole)


@pytest.mark.parametrize("options", [{"percentile": 99.5}, {"percentile": "a"}, {"cap": 0.5}, {"cap": "b"}])
def test_bad_options_are_refused(options):
    with pytest.raises(KitError, match=r"dynamic_threshold (percentile|cap) must be"):
        guidance.create("dynamic_threshold", **options)

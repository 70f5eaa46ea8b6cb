"""Distances between distributions against closed forms and independent implementations."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit.errors import KitError
from imagen_kit.evaluation import distances


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fid_of_known_gaussians():
    x = normal(300, 4)
    # A shifted and scaled copy has covariance s²C: |c|² + tr(C + s²C - 2sC) = |c|² + (1 - s)² tr C.
    moved = 1.5 * x + torch.tensor([1.0, -2.0, 0.0, 0.5])
    shift = (moved.mean(0) - x.mean(0)).square().sum()
    spread = 0.25 * x.T.cov().trace()
    # torchmetrics takes the root of a product of matrices by its eigenvalues: 1e-6 of its size
    assert distances.fid(moved, x) == pytest.approx((shift + spread).item(), rel=1e-5)
    assert distances.fid(x, x) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_estimate():
    x, y = normal(40, 3), normal(40, 3, seed=1) + 0.5

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    def off(k):
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    expected = off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert distances.kid(x, y) == pytest.approx(expected.item(), rel=1e-9)  # one subset, of all
    assert distances.kid(x, y[:30]) == distances.kid(x, y[:30])  # the subsets have a seed of their own
    state = torch.get_rng_state()
    distances.kid(x, y[:30])
    assert torch.equal(torch.get_rng_state(), state)  # and leave the caller's alone


def test_precision_and_recall_count_who_lies_among_the_others():
    real = torch.arange(20, dtype=torch.float64)[:, None]  # the third neighbour lies 2 or 3 away
    assert distances.precision_recall(real, real) == (1.0, 1.0)
    assert distances.precision_recall(real + 100, real) == (0.0, 0.0)
    # Half of the samples lie amid the data, and reach all of it; the other half far off, reaching nothing.
    halves = torch.cat([real, real + 1000])
    precision, recall = distances.precision_recall(halves, real)
    assert (precision, recall) == (0.5, 1.0)
    # A mode dropped: all drawn are real, but only the first half of the real ones and its edge are drawn.
    precision, recall = distances.precision_recall(real[:10], real)
    assert precision == 1.0
    assert recall == 13 / 20  # 10, 11 and 12 lie within 3 of 9, whose third neighbour is 6


def test_sliced_wasserstein_in_one_dimension_and_for_a_shift():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.5], [1.0]])
    # Quantile functions differ by 1/2 between 1/3 and 2/3: (1/4 · 1/3)^½.
    assert distances.sliced_wasserstein(a.double(), b.double()) == pytest.approx(math.sqrt(1 / 12), abs=1e-12)
    x = normal(50, 3)
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    # Along a direction u the distance is |c·u|, whose mean square over all is |c|²/3: 128 directions suffice
    # for a tenth.
    assert distances.sliced_wasserstein(x + shift, x) == pytest.approx(5 / math.sqrt(3), rel=0.1)
    assert distances.sliced_wasserstein(x, x.flip(0)) < 1e-12  # projected in another order


def test_energy_distance_is_scipys():
    from scipy.stats import energy_distance

    x, y = normal(60, 1), normal(45, 1, seed=1) * 2 + 0.3
    expected = energy_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert distances.energy(x, y) == pytest.approx(expected, rel=1e-9)
    assert distances.energy(x, x) == 0


def test_samples_of_any_shape_and_their_limits():
    x = normal(8, 12).reshape(8, 3, 2, 2)
    assert set(distances.sample_distances(x, x)) == {"sliced_wasserstein", "energy"}
    assert set(distances.feature_distances(x.flatten(1), normal(9, 12))) == {
        "fid",
        "kid",
        "precision",
        "recall",
    }
    with pytest.raises(KitError, match="at least 4 samples"):
        distances.feature_distances(x.flatten(1)[:3], normal(9, 12))
    with pytest.raises(KitError, match="12 numbers cannot be compared with data of 4"):
        distances.sample_distances(x, normal(9, 4))

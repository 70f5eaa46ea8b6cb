"""Distances between two sets of samples: how far what a model draws is from the data, as distributions.

Axes: n generated samples, m real ones, d numbers (features, or coordinates) of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError

DIRECTIONS = 128  # of the sliced Wasserstein distance
NEIGHBOURS = 3  # of precision and recall, as in Kynkäänniemi et al. 2019
FEW = 16  # numbers of a sample, up to which distances are taken without a matrix product
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000


def feature_distances(generated: Tensor, real: Tensor) -> dict[str, float]:
    """``fid``, ``kid``, ``precision`` and ``recall`` of (n, d) against (m, d) features.

    FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) by torchmetrics. FID is biased upwards while n is
    small against d, alike for all samplers of one comparison; KID is not, and may fall below 0.

    Raises:
        KitError: fewer than 4 samples on either side.
    """
    _check(generated, real, least=NEIGHBOURS + 1)
    precision, recall = precision_recall(generated, real)
    return {
        "fid": fid(generated, real),
        "kid": kid(generated, real),
        "precision": precision,
        "recall": recall,
    }


def sample_distances(generated: Tensor, real: Tensor, within_real: float | None = None) -> dict[str, float]:
    """``sliced_wasserstein`` and ``energy`` of samples themselves, (n, ...) against (m, ...).

    ``within_real`` is ``mean_distance(real, real)``, for who has it already.
    """
    generated, real = generated.flatten(1).double(), real.flatten(1).double()
    _check(generated, real, least=1)
    return {
        "sliced_wasserstein": sliced_wasserstein(generated, real),
        "energy": energy(generated, real, within_real),
    }


class _Ready(nn.Identity):
    """Stands for torchmetrics' network where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def fid(generated: Tensor, real: Tensor) -> float:
    """|mean difference|² + tr(C + C' - 2 (C C')^½) of the Gaussians fitted to both sets."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Ready(generated.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    # Rounding of the matrix root leaves equal sets a little below 0.
    return max(0.0, metric.compute().item())


def kid(generated: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y/d + 1)³, the mean over subsets drawn with a fixed seed."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(generated), len(real), KID_SUBSET_SIZE)
    whole = size == len(generated) == len(real)
    metric = KernelInceptionDistance(
        feature=_Ready(generated.shape[1]),
        subsets=1 if whole else KID_SUBSETS,
        subset_size=size,
        normalize=True,
    )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return metric.compute()[0].item()


def precision_recall(generated: Tensor, real: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated samples among the real ones, and of real ones among the generated.

    A sample lies among a set when it is no further from one of its members than that member's k-th neighbour
    in the set (Kynkäänniemi et al. 2019, eq. 1-2).
    """

    def among(samples: Tensor, members: Tensor) -> float:
        own = torch.cdist(members, members)
        radius = own.kthvalue(k + 1, dim=1).values  # the nearest is the member itself
        return (torch.cdist(samples, members) <= radius).any(1).double().mean().item()

    return among(generated, real), among(real, generated)


def sliced_wasserstein(generated: Tensor, real: Tensor, directions: int = DIRECTIONS) -> float:
    """Root mean square over directions of the 1-D Wasserstein-2 distance (Bonneel et al. 2015), exact in each.

    The directions are drawn with a fixed seed, so that all samplers are measured along the same.
    """
    source = torch.Generator().manual_seed(0)
    axes = torch.randn(generated.shape[1], directions, generator=source, dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    a, b = (set_ @ axes for set_ in (generated, real))
    a, b = a.sort(0).values, b.sort(0).values
    # Both quantile functions are constant between the multiples of 1/n and 1/m.
    n, m = len(a), len(b)
    edges = torch.cat([torch.arange(count + 1, dtype=torch.float64) / count for count in (n, m)])
    edges = edges.sort().values
    width, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    i, j = ((middle * count).long().clamp(max=count - 1) for count in (n, m))
    squares = (width[:, None] * (a[i] - b[j]).square()).sum(0)
    return squares.mean().sqrt().item()


def energy(generated: Tensor, real: Tensor, within_real: float | None = None) -> float:
    """Energy distance (2 E|X-Y| - E|X-X'| - E|Y-Y'|)^½ of the two empirical distributions (Székely & Rizzo 2013)."""
    within = mean_distance(real, real) if within_real is None else within_real
    square = 2 * mean_distance(generated, real) - mean_distance(generated, generated) - within
    return max(0.0, square) ** 0.5


def mean_distance(a: Tensor, b: Tensor) -> float:
    """Mean of |x - y| over all pairs of (n, ...) and (m, ...)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    # |x|² + |y|² - 2xy is quick where there are many numbers, but turns distances of 0 into some of 1e-8.
    mode = "use_mm_for_euclid_dist" if a.shape[1] > FEW else "donot_use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode).mean().item()


def _check(generated: Tensor, real: Tensor, least: int) -> None:
    if min(len(generated), len(real)) < least:
        raise KitError(
            f"a distance between distributions needs at least {least} samples on both sides, "
            f"not {len(generated)} drawn and {len(real)} real ones"
        )
    if generated.shape[1] != real.shape[1]:
        raise KitError(
            f"samples of {generated.shape[1]} numbers cannot be compared with data of {real.shape[1]}"
        )

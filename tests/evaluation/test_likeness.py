"""Likeness of pairs of pictures against formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchmetrics
from torchvision import models

from imagen_kit.errors import KitError
from imagen_kit.evaluation.likeness import BEST_PSNR, Lpips, psnr, rmse, ssim


def pictures(seed, n=2, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_rmse_and_psnr_of_known_differences():
    a = torch.full((2, 3, 4, 4), 0.5)
    b = a + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert rmse(a, b) == pytest.approx(math.sqrt((0.01 + 0.0001) / 2), rel=1e-5)
    assert psnr(a, b) == pytest.approx((20 + 40) / 2, rel=1e-5)  # a mean over pictures, not over pixels
    assert rmse(a, a) == 0
    assert psnr(a, a) == BEST_PSNR


def test_ssim_of_flat_pictures():
    a, b = (torch.full((1, 3, 32, 32), v) for v in (0.2, 0.6))
    c1 = 0.01**2
    # Without variance only the luminance term is left: (2ab + c1)/(a² + b² + c1).
    assert ssim(a, b) == pytest.approx((2 * 0.12 + c1) / (0.04 + 0.36 + c1), rel=1e-3)
    assert ssim(pictures(0), pictures(0)) == pytest.approx(1)
    assert ssim(pictures(0), pictures(1)) < 0.2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "mine.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def test_lpips_follows_its_definition_with_the_weights_of_the_file(weights):
    metric = Lpips(weights)
    a, b = pictures(0, side=64), pictures(1, side=64)
    assert metric.name == "squeeze@mine.pth"
    assert metric(a, a) == 0

    network = models.squeezenet1_1(weights=None)
    network.load_state_dict(torch.load(weights))
    heads = torch.load(
        Path(torchmetrics.__file__).parent / "functional/image/lpips_models/squeeze.pth", map_location="cpu"
    )
    shift, scale = (
        torch.tensor(v).reshape(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    total, ends = torch.zeros(2), (2, 5, 8, 10, 11, 12, 13)
    x, y = ((2 * v - 1 - shift) / scale for v in (a, b))
    with torch.no_grad():
        for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            x, y = (network.features[start:end](v) for v in (x, y))
            u, v = (f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in (x, y))
            weight = heads[f"lin{i}.model.1.weight"]
            total += ((u - v).square() * weight).sum(1).mean((1, 2))
    assert metric(a, b) == pytest.approx(total.mean().item(), rel=1e-4)  # float32 sums of 13 layers
    assert metric(a, b) > 0


def test_pictures_too_small_for_lpips(weights):
    with pytest.raises(KitError, match="pictures of 4x4 pixels are too small"):
        Lpips(weights)(pictures(0, side=4), pictures(1, side=4))


def test_lpips_weights_that_are_none(tmp_path, weights):
    with pytest.raises(KitError, match="there is no file"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("<html>")
    with pytest.raises(KitError, match="does not hold torchvision's weights"):
        Lpips(tmp_path / "text.pth")
    tensors = torch.load(weights)
    tensors.pop("features.12.expand3x3.bias")
    torch.save(tensors, tmp_path / "cut.pth")
    before = torch.hub.get_dir()
    with pytest.raises(KitError, match="does not fit squeezenet1_1"):
        Lpips(tmp_path / "cut.pth")
    assert torch.hub.get_dir() == before

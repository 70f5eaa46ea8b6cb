"""How like two batches of pictures are, pair by pair.

Axes: b pictures, c colours, h w pixels; all in [0, 1].
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from imagen_kit.errors import KitError

BEST_PSNR = 120.0  # dB; what equal pictures are given, as JSON has no infinity
BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two batches, in their own units."""
    return (a.double() - b.double()).square().mean().sqrt().item()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures; at most ``BEST_PSNR``."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=BEST_PSNR).mean().item()


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over pictures, by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    found = measure(a.float(), b.float(), data_range=1.0)
    assert isinstance(found, Tensor)
    return found.item()


class Lpips:
    """LPIPS (Zhang et al. 2018) by torchmetrics, with the backbone's weights from a file.

    Args:
        path: torchvision's weights of alexnet, vgg16 or squeezenet1_1; the kind is known by its tensors.
        device: where it computes.

    Raises:
        KitError: no such file, or not weights of one of the three.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        path = Path(path)
        net = find_backbone(path)
        self.name = f"{net}@{path.name}"
        with _hub_holding(path, net):
            try:
                metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True)  # type: ignore[arg-type]
            except RuntimeError as error:
                text = " ".join(str(error).split())[:200]
                raise KitError(f"{path} does not fit {BACKBONES[net]}: {text}") from error
        self._metric = metric.eval().to(device)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:
        """Mean distance of two batches (b, 3, h, w) in [0, 1]."""
        self._metric.reset()
        for pair in zip(a.split(16), b.split(16), strict=True):
            try:
                self._metric.update(*(v.float().clamp(0, 1).to(self._metric.device) for v in pair))
            except RuntimeError as error:  # a convolution or a pooling that nothing is left for
                size = "x".join(map(str, a.shape[-2:]))
                raise KitError(f"pictures of {size} pixels are too small for {self.name}") from error
        found = self._metric.compute().item()
        if not math.isfinite(found):
            raise KitError(f"LPIPS with {self.name} is not finite; are these the right weights?")
        return found


def find_backbone(path: Path) -> str:
    """``alex``, ``vgg`` or ``squeeze``: what the weights in a file are of, by their first layers.

    Raises:
        KitError: no such file, or none of the three.
    """
    if not path.is_file():
        raise KitError(f"--lpips: there is no file {path}; give torchvision's weights of alexnet or vgg16")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        first = tuple(tensors["features.0.weight"].shape)
    except Exception as error:  # torch.load names its many failures by many classes
        raise KitError(
            f"{path} does not hold torchvision's weights of {', '.join(BACKBONES.values())}"
        ) from error
    if first == (64, 3, 11, 11):
        return "alex"
    return "squeeze" if "features.3.squeeze.weight" in tensors else "vgg"


@contextlib.contextmanager
def _hub_holding(path: Path, net: str) -> Iterator[None]:
    """Torch's folder of downloads replaced by one that holds this file under its official name."""
    from torchvision import models

    url = models.get_model_weights(BACKBONES[net])["DEFAULT"].url
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        shutil.copyfile(path, checkpoints / Path(url).name)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)

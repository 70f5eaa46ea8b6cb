"""Pictures in a folder, each with its caption in a text file of the same name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from imagen_kit.data import register
from imagen_kit.data.base import Examples
from imagen_kit.errors import KitError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@register("folder")
class FolderDataset:
    """``NAME.png`` (jpg, webp) beside ``NAME.txt``; shorter side resized, then a square crop.

    Args:
        path: the folder, searched with its subfolders.
        crop: ``center`` or ``random``.

    Raises:
        KitError: no such folder, no picture in it, or a picture without a caption.
    """

    def __init__(self, path: str, crop: str = "center"):
        folder = Path(path)
        if not folder.is_dir():
            raise KitError(f"dataset folder {path!r} does not exist")
        if crop not in ("center", "random"):
            raise KitError(f"unknown crop {crop!r}; choose from center, random")
        self.crop = crop
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
        if not self.files:
            raise KitError(f"dataset folder {path!r} holds no picture ({', '.join(ENDINGS)})")
        for file in self.files:
            if not file.with_suffix(".txt").is_file():
                raise KitError(f"picture {file} has no caption: write one to {file.with_suffix('.txt').name}")

    def batch(self, n: int, size: int, generator: torch.Generator, low_size: int | None = None) -> Examples:
        """n random pictures with replacement; the low-resolution ones are antialiased reductions."""
        picks = torch.randint(len(self.files), (n,), generator=generator).tolist()
        return self._load([self.files[i] for i in picks], size, low_size, generator)

    def examples(self, n: int, size: int, low_size: int | None = None) -> Examples:
        """The first n pictures, repeated where there are fewer."""
        files = [self.files[i % len(self.files)] for i in range(n)]
        return self._load(files, size, low_size, torch.Generator().manual_seed(0))

    def _load(
        self, files: list[Path], size: int, low_size: int | None, generator: torch.Generator
    ) -> Examples:
        pictures = torch.stack([self._picture(file, size, generator) for file in files])
        captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
        low_res = None
        if low_size is not None:
            low_res = F.interpolate(pictures, size=(low_size, low_size), mode="bilinear", antialias=True)
        return Examples(pictures, captions, low_res)

    def _picture(self, file: Path, size: int, generator: torch.Generator) -> Tensor:
        """(3, size, size) in [-1, 1]."""
        import numpy as np
        from PIL import Image

        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise KitError(f"picture {file} cannot be read ({error})") from error
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        spare = torch.tensor([width - size, height - size])
        if self.crop == "random":
            left, top = (torch.rand(2, generator=generator) * (spare + 1)).long().tolist()
        else:
            left, top = (spare // 2).tolist()
        image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1

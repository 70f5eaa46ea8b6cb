"""What a pipeline returns.

Axes: b pictures, 3 colours, h w.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.files import replacing, require_writable

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Images:
    """Pictures with what they were made from.

    Attributes:
        tensor: (b, 3, h, w) float32 in [0, 1].
        prompts: b prompts.
        seeds: b seeds; the prompt, the seed and the pipeline's settings give the same picture again.
    """

    tensor: Tensor
    prompts: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.tensor)

    def uint8(self) -> Tensor:
        """(b, h, w, 3) uint8 on the CPU, rounded to nearest."""
        return (
            self.tensor.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
        )

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(picture.numpy()) for picture in self.uint8()]

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures, each file complete or not at all; folders are made as needed.

        Args:
            path: a file (png, jpg, webp) or a folder, see ``output_paths``.

        Returns:
            The files written, in order.

        Raises:
            KitError: a suffix that is no picture format, or a place that cannot be written.
        """
        targets = output_paths(path, len(self))
        if targets:
            require_writable(targets[0].parent, folder=True)
        for picture, target in zip(self.pil(), targets, strict=True):
            with replacing(target) as temporary:
                picture.save(temporary, quality=95)  # png, being lossless, has no use for it
        return targets


def output_paths(path: str | Path, count: int) -> list[Path]:
    """The files that ``count`` pictures saved to ``path`` become.

    A path with a picture suffix is a file; several pictures are numbered beside it (``a.png`` → ``a-00.png``,
    ``a-01.png``, ...). A path without suffix, or a folder that exists, is a folder for ``00.png``,
    ``01.png``, ...

    Raises:
        KitError: a suffix that is no picture format.
    """
    path = Path(path)
    width = max(2, len(str(count - 1)))
    if path.is_dir() or not path.suffix:
        return [path / f"{i:0{width}d}.png" for i in range(count)]
    if path.suffix.lower() not in SUFFIXES:
        raise KitError(
            f"cannot write pictures as {path.suffix!r} ({path}); choose from {', '.join(SUFFIXES)}"
        )
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:0{width}d}{path.suffix}") for i in range(count)]

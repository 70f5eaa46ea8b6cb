"""Noise-conditioning augmentation: what a super-resolution stage is shown of the picture before it.

Axes: b batch, c h w the small picture, c s s the stage's picture.

Training and sampling call the same function, so the two cannot drift apart.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_kit.errors import KitError


def resize(pictures: Tensor, size: int) -> Tensor:
    """(b, c, h, w) → (b, c, size, size) by bilinear interpolation at half-pixel centres.

    ``align_corners=False`` and ``antialias=False``: the cascade only enlarges, and there
    antialiasing does nothing.
    """
    if pictures.shape[-2:] == (size, size):
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False, antialias=False)


def augment_low_res(low_res: Tensor, size: int, level: Tensor | float, noise: Tensor) -> Tensor:
    """Resize the small picture and noise it: cos(level·π/2)·resize(low_res) + sin(level·π/2)·noise.

    This is the variance-preserving cosine process of Ho et al. 2022 (cascaded diffusion), as Imagen uses it
    (Saharia et al. 2022, §2.5): level 0 leaves the picture as it is, level 1 leaves noise alone. The denoiser
    is told ``level`` through ``Cond.low_res_level``. The result is not clipped: values leave [-1, 1].

    Args:
        low_res: (b, c, h, w) in [-1, 1].
        size: side of the stage's picture.
        level: (b,) noise levels in [0, 1], or one number for all.
        noise: (b, c, size, size) standard normal.

    Returns:
        (b, c, size, size) in low_res's dtype.

    Raises:
        KitError: a number outside [0, 1], or noise of another shape. A tensor's values are not read, since
            that would stall the device.
    """
    enlarged = resize(low_res, size)
    if noise.shape != enlarged.shape:
        raise KitError(
            f"augmentation noise has shape {tuple(noise.shape)}; it must be {tuple(enlarged.shape)}"
        )
    if isinstance(level, Tensor):
        if level.shape not in ((), low_res.shape[:1]):
            raise KitError(
                f"noise levels have shape {tuple(level.shape)}; give one per picture: {len(low_res)}"
            )
        angle = level.to(torch.float32).reshape(-1, 1, 1, 1) * (math.pi / 2)
        mixed = torch.cos(angle) * enlarged + torch.sin(angle) * noise
        return mixed.to(low_res.dtype)
    check_level(level)
    fixed = level * math.pi / 2
    return math.cos(fixed) * enlarged + math.sin(fixed) * noise.to(low_res.dtype)


def check_level(level: object, what: str = "low_res_level") -> float:
    """A noise level as a float; KitError unless it is a number in [0, 1]."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.0 <= level <= 1.0:
        raise KitError(f"{what} must be a number from 0 (clean) to 1 (noise only), got {level!r}")
    return float(level)

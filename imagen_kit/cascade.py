"""Noise-conditioning augmentation: what a super-resolution stage is shown of the picture before it.

Axes: b batch, c h w the small picture, c s s what the stage diffuses.

Training and sampling call the same function, so the two cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_kit.errors import KitError, unknown

TOLD = ("level", "label")


@dataclass(frozen=True)
class LowRes:
    """How a stage is shown the picture before it: enlarged to what it diffuses, noised, and told how much.

    The default is Imagen's. DeepFloyd IF's second stage is ``LowRes(cosine with 1000 timesteps,
    align_corners=True)``; Stable Diffusion's 4× upscaler, whose latents are as large as the picture before,
    ``LowRes(scaled_linear(1e-4, 0.02), told="label")``.

    Args:
        schedule: the discrete noise schedule of T steps by which the picture is noised, at its step
            ⌊level·T⌋; None for the continuous cosine of ``augment_low_res``.
        align_corners: whether enlarging keeps the outermost pixels' centres in place, not the picture's edges.
        told: how the network learns of the noise: ``level``, as ``Cond.low_res_level`` (with a schedule, its
            step / T); ``label``, the step itself as ``Cond.labels``.

    Raises:
        KitError: another ``told``; labels without a schedule; a schedule that is not discrete.
    """

    schedule: Any = None
    align_corners: bool = False
    told: str = "level"

    def __post_init__(self) -> None:
        if self.told not in TOLD:
            raise KitError(unknown("low_res.told", self.told, TOLD))
        if self.schedule is None and self.told == "label":
            raise KitError("low_res.told: label is the step of a schedule; give low_res.schedule too")
        if self.schedule is not None and not self.schedule.discrete:
            raise KitError("low_res.schedule must be discrete; give it timesteps, e.g. 1000")

    def __call__(
        self, picture: Tensor, size: int, level: Tensor | float, noise: Tensor
    ) -> Mapping[str, Tensor]:
        """The fields of ``Cond`` that show a stage the picture before it.

        Args:
            picture: (b, c, h, w) in [-1, 1].
            size: side of what the stage diffuses.
            level: (b,) noise levels in [0, 1], or one number for all.
            noise: (b, c, size, size) standard normal.

        Returns:
            ``low_res`` (b, c, size, size) in the picture's dtype, and ``low_res_level`` (b,) float32 or
            ``labels`` (b,) int64.

        Raises:
            KitError: as ``augment_low_res``.
        """
        if not isinstance(level, Tensor):
            check_level(level)
        levels = torch.as_tensor(level, dtype=torch.float32).expand(len(picture))
        if self.schedule is None:
            shown = augment_low_res(picture, size, level, noise, self.align_corners)
            return {"low_res": shown, "low_res_level": levels.to(picture.device)}
        enlarged = _enlarged(picture, size, noise, self.align_corners)
        # a thousandth of a step: 0.29·1000 is 289.99998 in float32
        count = self.schedule.discrete
        steps = (levels.double() * count + 1e-3).floor().clamp(max=count - 1)
        alpha, sigma = (c.to(enlarged).reshape(-1, 1, 1, 1) for c in self.schedule.alpha_sigma(steps))
        told = (
            {"labels": steps.long()} if self.told == "label" else {"low_res_level": (steps / count).float()}
        )
        shown = alpha * enlarged + sigma * noise.to(enlarged.dtype)
        return {"low_res": shown, **{key: value.to(picture.device) for key, value in told.items()}}


def resize(pictures: Tensor, size: int, align_corners: bool = False) -> Tensor:
    """(b, c, h, w) → (b, c, size, size) by bilinear interpolation, by default at half-pixel centres.

    Without antialiasing: the cascade only enlarges, and there it does nothing.
    """
    if pictures.shape[-2:] == (size, size):
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=align_corners)


def augment_low_res(
    low_res: Tensor, size: int, level: Tensor | float, noise: Tensor, align_corners: bool = False
) -> Tensor:
    """Resize the small picture and noise it: cos(level·π/2)·resize(low_res) + sin(level·π/2)·noise.

    This is the variance-preserving cosine process of Ho et al. 2022 (cascaded diffusion), as Imagen uses it
    (Saharia et al. 2022, §2.5): level 0 leaves the picture as it is, level 1 leaves noise alone. The denoiser
    is told ``level`` through ``Cond.low_res_level``. The result is not clipped: values leave [-1, 1].

    Args:
        low_res: (b, c, h, w) in [-1, 1].
        size: side of the stage's picture.
        level: (b,) noise levels in [0, 1], or one number for all.
        noise: (b, c, size, size) standard normal.
        align_corners: see ``LowRes``.

    Returns:
        (b, c, size, size) in low_res's dtype.

    Raises:
        KitError: a number outside [0, 1], or noise of another shape. A tensor's values are not read, since
            that would stall the device.
    """
    enlarged = _enlarged(low_res, size, noise, align_corners)
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


def _enlarged(pictures: Tensor, size: int, noise: Tensor, align_corners: bool) -> Tensor:
    enlarged = resize(pictures, size, align_corners)
    if noise.shape != enlarged.shape:
        raise KitError(
            f"augmentation noise has shape {tuple(noise.shape)}; it must be {tuple(enlarged.shape)}"
        )
    return enlarged

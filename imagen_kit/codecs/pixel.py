"""Diffusion in pixel space."""

from __future__ import annotations

from torch import Tensor

from imagen_kit.codecs import register


@register("pixel")
class Pixel:
    """The identity: a stage diffuses the picture itself, as Imagen does."""

    channels = 3
    factor = 1

    def encode(self, pictures: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1], returned as they are."""
        return pictures

    def decode(self, latents: Tensor) -> Tensor:
        """(b, 3, h, w), returned as they are."""
        return latents

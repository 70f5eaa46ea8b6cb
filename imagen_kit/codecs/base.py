"""What a codec is: the map between pictures and the space a stage diffuses in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Pictures ↔ latents.

    Attributes:
        channels: channels of the latents.
        factor: picture side / latent side.
    """

    channels: int
    factor: int

    def encode(self, pictures: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → (b, channels, h/factor, w/factor), scaled to about unit spread."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(b, channels, h/factor, w/factor) → (b, 3, h, w) in [-1, 1], up to overshoot."""
        ...

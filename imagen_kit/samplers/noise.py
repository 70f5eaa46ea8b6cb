"""Where a run's Gaussian noise comes from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.tableau import working_dtype
from imagen_kit.sending import send

Generators = torch.Generator | Sequence[torch.Generator]


def gaussian(like: Tensor, generator: Generators | None = None) -> Gaussian:
    """A source of standard Gaussians of the shape of ``like``, in float32 or better.

    Args:
        like: (b, ...) tensor that gives shape, device and precision.
        generator: drawn from on its own device; a list holds one for every entry of the batch.

    Raises:
        KitError: a list of another length than the batch.
    """
    return Gaussian(like, generator)


class Gaussian:
    """See ``gaussian``; () -> a new tensor, and ``fill_`` for one that is there already, of the same values."""

    def __init__(self, like: Tensor, generator: Generators | None = None):
        self.shape, self.device, self.dtype = like.shape, like.device, working_dtype(like)
        self.one = generator if isinstance(generator, torch.Generator) else None
        self.each = None if generator is None or self.one is not None else list(generator)  # type: ignore[arg-type]
        if self.each is not None and len(self.each) != len(like):
            raise KitError(
                f"{len(self.each)} generators were given for a batch of {len(like)}; give one a sample"
            )

    def __call__(self) -> Tensor:
        if self.each is None:
            return send(self._draw(self.shape, self.one), self.device)
        return send(torch.stack([self._draw(self.shape[1:], source) for source in self.each]), self.device)

    def fill_(self, out: Tensor) -> None:
        """Draw into ``out``, a contiguous tensor of the shape, on the generators' device."""
        if self.each is None:
            out.normal_(generator=self.one)
        else:
            for part, source in zip(out, self.each, strict=True):
                part.normal_(generator=source)

    def _draw(self, shape: torch.Size, source: torch.Generator | None) -> Tensor:
        device = self.device if source is None else source.device
        return torch.randn(shape, generator=source, device=device, dtype=self.dtype)

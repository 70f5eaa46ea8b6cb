"""What a sampler is asked for besides the denoiser, the noise to start from and the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.noise import Generators, gaussian
from imagen_kit.samplers.tableau import Callback, Noise

#: Noisiest first: n numbers, or for ``sample`` (b, n): a grid for every sample.
Grid = Sequence[float] | Tensor


@dataclass(frozen=True)
class Asked:
    """One call of ``Sampler.sample``, whose arguments these are; ``noise`` is the source they come to."""

    steps: int | None
    timesteps: Grid | None
    sigmas: Grid | None
    nfe: int | None
    generator: Generators | None
    noise: Noise
    callback: Callback | None

    @property
    def which(self) -> str:
        """Whether its grid is of ``timesteps`` or of ``sigmas``."""
        return "sigmas" if self.timesteps is None else "timesteps"


def source(x: Tensor, generator: Generators | None, noise: Noise | None) -> Noise:
    """Where a run on ``x`` draws its noise from.

    Raises:
        KitError: x of whole numbers, both sources given, or generators that do not fit the batch.
    """
    if not x.is_floating_point():
        raise KitError(f"a sampler needs a floating-point x, not {x.dtype}")
    if noise is not None and generator is not None:
        raise KitError("give either noise or a generator, not both")
    return noise or gaussian(x, generator)

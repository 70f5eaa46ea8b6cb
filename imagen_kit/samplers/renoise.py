"""CFG++: putting back the noise of the unconditional prediction instead of the guided one."""

from __future__ import annotations

from dataclasses import dataclass

from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.tableau import Form

SOURCES = ("guided", "uncond")


@dataclass(frozen=True, kw_only=True)
class Renoising(Sampler):
    """Samplers that can read the noise they put back from another x0 than the one they step towards.

    Guidance pushes x0 off the data manifold, and the noise read from a guided x0 off the noise's. CFG++
    (Chung et al. 2024, Algorithm 2) interpolates x0 with a scale in [0, 1] and renoises with the
    unconditional prediction, which stays on it.

    Args:
        renoise: ``guided``: the noise is read from the guided x0, as without CFG++; ``uncond``: from the
            unconditional x0, which the guided denoiser gives in the same evaluation.
    """

    renoise: str = "guided"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("renoise", SOURCES)

    def predict(self, x: Form, now: Point, run: Run) -> tuple[Form, Form | None]:
        """(x0 to step towards, x0 to read the noise from or None where that is the same)."""
        if self.renoise == "guided":
            return run.denoise(x, now), None
        x0, source = run.denoise(x, now, (self.renoise,))
        return x0, source

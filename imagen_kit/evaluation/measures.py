"""What a comparison measures in every cell, and what each number is called.

Axes: n pictures or samples, m real ones, d features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.evaluation import distances, likeness
from imagen_kit.evaluation.drawing import Drawn
from imagen_kit.evaluation.features import Extractor
from imagen_kit.evaluation.subjects import Subject

REAL = 512  # real samples that distributions are compared with, by default
LEAST = distances.NEIGHBOURS + 1  # samples on a side that features' distances need
SSIM_SIDE = 16  # pixels; below, its window does not fit


@dataclass(frozen=True)
class Quality:
    """One number that tells how good a cell is.

    Attributes:
        key: in cells, and for ``--target``.
        label: for axes and tables.
        better: ``lower`` or ``higher``.
        log: shown on a logarithmic axis at first.
        paired: compares with the converged solution of the same noise, as stochastic samplers cannot reach.
    """

    key: str
    label: str
    better: str = "lower"
    log: bool = False
    paired: bool = False


def value(row: Mapping[str, Any], key: str) -> float | None:
    """A cell's number by its quality's or cost's key; None where it was not measured."""
    found = row.get(key)
    return found.get("all") if isinstance(found, Mapping) else found


class Measures:
    """Which numbers are taken of a subject's results, and the real data they need, drawn once.

    Args:
        subject: what samplers are compared on.
        extractor: features for FID, KID, precision and recall of pictures; None = none of them.
        lpips: for the perceptual distance; None = without.
        real: most real samples to compare with.

    Raises:
        KitError: an extractor or LPIPS for results that are not pictures; too few samples for a distance.
    """

    def __init__(
        self,
        subject: Subject,
        extractor: Extractor | None = None,
        lpips: likeness.Lpips | None = None,
        real: int = REAL,
    ):
        if not subject.pictures and (extractor or lpips):
            raise KitError(f"{subject.name} has no pictures: it is measured on its samples, without features")
        if extractor is not None and min(subject.n, real) <= distances.NEIGHBOURS:
            raise KitError(f"distances between distributions need at least {LEAST} pictures on both sides")
        self.subject, self.extractor, self.lpips, self._count = subject, extractor, lpips, real
        self._real: Tensor | None = None
        self._within: float | None = None

    def facts(self) -> dict[str, Any]:
        """What must be equal for numbers to stand in one table."""
        compared = self.extractor is not None or not self.subject.pictures
        return {
            "features": self.extractor.name if self.extractor else None,
            "data": getattr(self.subject, "data", None) if self.extractor else None,
            "real": self._count if compared else None,
            "lpips": self.lpips.name if self.lpips else None,
        }

    def qualities(self) -> list[dict[str, Any]]:
        """All that is measured, the foremost first, as ``results.json`` keeps it."""
        subject = self.subject
        found = [Quality("rmse", f"RMSE to the converged result ({subject.result})", log=True, paired=True)]
        if subject.stages > 1:
            found.append(
                Quality("rmse_final", "RMSE to the converged result (last stage)", log=True, paired=True)
            )
        if subject.pictures:
            found.append(Quality("psnr", "PSNR to the converged picture (dB)", "higher", paired=True))
        if subject.side >= SSIM_SIDE:
            found.append(Quality("ssim", "SSIM to the converged picture", "higher", paired=True))
        if self.lpips is not None:
            found.append(Quality("lpips", f"LPIPS ({self.lpips.name}) to the converged picture", paired=True))
        if subject.judged:
            found.append(Quality("accuracy", "share with all attributes right", "higher"))
        if self.extractor is not None:
            name = self.extractor.name
            found += [
                Quality("fid", f"FID ({name})"),
                Quality("kid", f"KID ({name})"),
                Quality("precision", f"precision ({name})", "higher"),
                Quality("recall", f"recall ({name})", "higher"),
            ]
        if not subject.pictures:
            found.append(Quality("sliced_wasserstein", "sliced Wasserstein distance to the data", log=True))
            found.append(Quality("energy", "energy distance to the data", log=True))
        return [asdict(quality) for quality in found]

    def paired(self, drawn: Drawn, converged: Drawn) -> dict[str, float | None]:
        """Distances to the converged results of the same noise."""
        out = {"rmse": likeness.rmse(drawn.first, converged.first)}
        if self.subject.stages > 1:
            out["rmse_final"] = likeness.rmse(drawn.final, converged.final)
        if self.subject.pictures:
            out["psnr"] = likeness.psnr(drawn.final, converged.final)
            if self.subject.side >= SSIM_SIDE:
                out["ssim"] = likeness.ssim(drawn.final, converged.final)
        if self.lpips is not None:
            out["lpips"] = self.lpips(drawn.final, converged.final)
        return finite(out)

    def distribution(self, drawn: Drawn) -> dict[str, float | None]:
        """Distances between the results and the data, as distributions."""
        if not self.subject.pictures:
            real = self._data()
            if self._within is None:
                self._within = distances.mean_distance(real, real)
            return finite(distances.sample_distances(drawn.final, real, self._within))
        if self.extractor is None:
            return {}
        return finite(distances.feature_distances(self.extractor(drawn.final), self._data()))

    def prepare(self) -> None:
        """Draw the real data and try what may not fit, before anything is drawn.

        Raises:
            KitError: no or too few data for a distance, pictures too small for LPIPS.
        """
        if self.extractor is not None or not self.subject.pictures:
            real = self._data()
            if self.extractor is not None and len(real) <= distances.NEIGHBOURS:
                raise KitError(f"--data holds {len(real)} pictures; distances need at least {LEAST}")
        if self.lpips is not None:
            blank = torch.zeros(1, 3, self.subject.side, self.subject.side)
            self.lpips(blank, blank)

    def _data(self) -> Tensor:
        """The real samples, or their features: (m, d)."""
        if self._real is None:
            real = self.subject.real(self._count)
            if real is None:
                raise KitError("distances between distributions need data; give a data set with --data")
            self._real = real if self.extractor is None else self.extractor(real)
        return self._real


def finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """The row with None for what is not finite, as JSON has no word for it."""
    return {key: number if math.isfinite(number) else None for key, number in row.items()}

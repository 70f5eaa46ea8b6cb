"""What training asks of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """One batch.

    Attributes:
        pictures: (b, 3, size, size) in [-1, 1].
        captions: b strings.
        low_res: (b, 3, low_size, low_size) in [-1, 1] for a super-resolution stage, or None.
    """

    pictures: Tensor
    captions: list[str]
    low_res: Tensor | None = None


class Dataset(Protocol):
    """A source of captioned pictures, addressed by a generator so that a batch can be drawn again."""

    def batch(self, n: int, size: int, generator: torch.Generator, low_size: int | None = None) -> Examples:
        """Draw n examples at ``size`` pixels, with their ``low_size`` versions where that is given."""

    def examples(self, n: int, size: int, low_size: int | None = None) -> Examples:
        """n fixed examples for previews, the same at every call and not among the training ones if possible."""

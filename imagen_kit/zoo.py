"""A ready pipeline by one name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from imagen_kit.pipeline import Pipeline


def load(
    name_or_path: str | Path = "pocket-imagen",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    overrides: Iterable[str] = (),
) -> Pipeline:
    """The pipeline of a recipe, weights and all.

    Args:
        name_or_path: a shipped recipe's name, or a recipe file.
        device: where its networks run; a GPU when there is one, else the CPU.
        dtype: of the denoisers whose recipe leaves it open; float32 by default, ``auto`` for the fastest here.
        overrides: changes to the recipe, e.g. ``["stages.base.sampler.name=ddim"]``.

    Raises:
        KitError: no such recipe, a fault in it, or weights that do not fit.
    """
    import torch

    from imagen_kit import recipe

    checked = recipe.load(name_or_path, overrides)
    return checked.build(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)

"""Training of a recipe's stage, or of its text encoder, as the recipe's ``train`` section says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["run"]


def run(
    recipe: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overrides: Iterable[str] = (),
    progress: bool = True,
) -> dict[str, float]:
    """Train, writing to ``out``: ``checkpoint.pt``, ``log/``, ``samples/`` and, at the end, ``weights/``.

    Args:
        recipe: a shipped recipe's name or a file with a ``train`` section.
        out: the run's folder; a folder that holds another run is refused.
        resume: go on from the folder's checkpoint, step for step as if never interrupted.
        overrides: ``a.b=c`` changes to the recipe, e.g. ``train.steps=100``.
        progress: show a bar.

    Returns:
        the last logged scalars.

    Raises:
        KitError: a recipe without a ``train`` section, no such stage, an output that cannot be written.
    """
    from imagen_kit import recipe as recipes
    from imagen_kit.errors import KitError
    from imagen_kit.files import require_writable
    from imagen_kit.training import loop, tasks
    from imagen_kit.training.state import CHECKPOINT

    loaded = recipes.load(recipe, overrides)
    if loaded.train is None:
        raise KitError(f"recipe {recipe} has no train section; add one, e.g. train: {{steps: 1000}}")
    folder = require_writable(out, folder=True, make=False)
    if not resume and (folder / CHECKPOINT).exists():
        raise KitError(f"output folder {folder} holds a run already; add --resume, or choose another folder")
    task = tasks.build(loaded)
    require_writable(folder, folder=True)  # made only now: what is refused leaves nothing behind
    return loop.train(task, folder, resume=resume, progress=progress)

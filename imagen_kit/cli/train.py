"""``imagen-kit train``: a recipe's ``train`` section, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError
from imagen_kit.files import require_writable


def _going_on(given: Mapping[str, Any]) -> str:
    """What to do after Ctrl-C."""
    from imagen_kit.training.state import CHECKPOINT

    kept = Path(given["output"]) / CHECKPOINT
    if kept.exists():
        return f"the same command with --resume goes on from {kept}"
    return "there is no checkpoint yet, and the same command begins anew; train.checkpoint_every is how often one is"


@common.interruptible(_going_on)
def train(
    recipe: common.RecipeArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Checkpoints, logs, samples and weights.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from DIR's checkpoint.")] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps, instead of the recipe's.")
    ] = None,
    assignments: common.SetOption = None,
) -> None:
    """Train what a recipe describes."""
    if steps is not None and steps < 1:
        raise KitError(f"--steps must be at least 1, not {steps}")
    changes = [*(assignments or ()), *([f"train.steps={steps}"] if steps is not None else ())]
    require_writable(output, folder=True, make=False)
    from imagen_kit import training

    training.run(recipe, output, resume=resume, overrides=changes)

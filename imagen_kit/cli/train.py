"""``imagen-kit train``: a recipe's ``train`` section, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError
from imagen_kit.files import require_writable


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

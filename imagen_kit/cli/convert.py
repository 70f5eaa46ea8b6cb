"""``imagen-kit convert``: community checkpoints to our layout and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A checkpoint: a file, or a diffusers folder.")],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="A .safetensors file; a folder for the diffusers layout.")
    ],
    layout: Annotated[str, typer.Option("--to", help="ours, diffusers or official.")] = "ours",
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="denoiser, codec or text_encoder, out of a file of a whole system."),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="The format of IN, where it fits several.")
    ] = None,
) -> None:
    """Write a checkpoint in another layout; every bit of its weights is kept."""
    from imagen_kit import checkpoints

    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise KitError(f"IN and OUT are both {source}; write somewhere else")
    with common.working("reading"):
        module = checkpoints.load(source, kind=kind, format=format)
    with common.working("writing"):
        written = checkpoints.save(module, target, layout)
    typer.echo(f"{source} → {written} ({layout})")

"""``imagen-kit list``: what there is, by kind."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from imagen_kit.errors import KitError, unknown
from imagen_kit.registry import Registry

KINDS = ("text_encoders", "denoisers", "samplers", "guidance", "caches", "schedules", "codecs", "data")


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help=f"One of {', '.join(KINDS)}, recipes; all by default."),
    ] = None,
) -> None:
    """List parts and recipes, one line each."""
    if kind is None:
        for place, each in enumerate((*KINDS, "recipes")):
            typer.echo(("\n" if place else "") + typer.style(each.replace("_", " "), bold=True))
            _print(rows(each), indent="  ")
    else:
        _print(rows(find_kind(kind)))


def find_kind(kind: str) -> str:
    """The plural name of a kind given in singular or plural, with - or _."""
    folded = kind.lower().replace("-", "_").replace(" ", "_")
    for known in (*KINDS, "recipes"):
        if folded in (known, known.removesuffix("s")):
            return known
    raise KitError(unknown("kind", kind, (*KINDS, "recipes")))


def registry_of(kind: str) -> Registry:
    """The registry of a plural kind."""
    return importlib.import_module(f"imagen_kit.{kind}").registry


def rows(kind: str) -> list[tuple[str, str]]:
    """(name, one-line summary) of everything of a plural kind."""
    if kind == "recipes":
        from imagen_kit.recipe import source

        return [(name, str(source.read(source.find(name)).get("description", ""))) for name in source.names()]
    registry = registry_of(kind)
    return [(name, registry.describe(name)["summary"]) for name in registry.names()]


def _print(lines: list[tuple[str, str]], indent: str = "") -> None:
    width = max((len(name) for name, _ in lines), default=0)
    for name, summary in lines:
        typer.echo(f"{indent}{name:<{width}}  {' '.join(summary.split())}".rstrip())

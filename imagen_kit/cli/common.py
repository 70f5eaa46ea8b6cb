"""Options and small steps that several commands share."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagen_kit.errors import KitError, unknown

if TYPE_CHECKING:
    import torch

    from imagen_kit.recipe import Recipe

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file of your own.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe, e.g. stages.sr.sampler.steps=8; repeatable."
    ),
]
SamplerOption = Annotated[str | None, typer.Option("--sampler", help="Sampler of the first stage.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Sampler steps of the first stage.")]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale of the first stage; 1 is none.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; a GPU where there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Precision of the denoisers whose recipe leaves it open: fp32, bf16, fp16, or auto: the fastest here.",
    ),
]


def load_recipe(
    name: str, assignments: Sequence[str] | None = None, sampler: str | None = None, steps: int | None = None
) -> Recipe:
    """The checked recipe with ``--set``, ``--sampler`` and ``--steps`` applied."""
    from imagen_kit import recipe

    changes = list(assignments or ())
    if sampler is not None:
        part = recipe.load(name, changes).stages[0].sampler
        kept = _common_options("sampler", sampler, part.options)
        changes.append(f"stages.0.sampler={json.dumps({'name': sampler, 'steps': part.steps, **kept})}")
    if steps is not None:
        changes.append(f"stages.0.sampler.steps={steps}")
    return recipe.load(name, changes)


def _common_options(kind: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of another part's options that the part ``name`` takes too: a swap keeps e.g. the spacing."""
    from imagen_kit.recipe.check import registries

    registry = registries()[kind]
    if name not in registry.names():
        return {}
    missing = registry.check(name, {})
    return {k: v for k, v in options.items() if set(registry.check(name, {k: v})) <= set(missing)}


def check_guidance(scale: float | None) -> float | None:
    """A finite guidance scale or None; KitError otherwise."""
    if scale is not None and not math.isfinite(scale):
        raise KitError(f"--guidance must be a finite number, not {scale}")
    return scale


def find_device(name: str | None) -> torch.device:
    """The device called ``name``; KitError when this machine has none such."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KitError(f"--device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def find_dtype(name: str) -> str:
    """fp32, bf16, fp16 or auto; KitError for another precision."""
    from imagen_kit.performance.options import DTYPES

    if name not in DTYPES:
        raise KitError("--dtype: " + unknown("precision", name, DTYPES))
    return name


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on the terminal while something loads; silent elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield

"""Options and small steps that several commands share."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagen_kit.errors import KitError, unknown

if TYPE_CHECKING:
    import torch

    from imagen_kit.pipeline import Pipeline
    from imagen_kit.recipe import Recipe

MOST_PICTURES = 1_000_000
MOST_SEED = 2**32 - 1  # beyond lie the seeds of the real pictures that drawn ones are compared with
MOST_GUIDANCE = 1e6

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
    """A guidance scale that float32 holds, or None; KitError otherwise."""
    if scale is not None and not (math.isfinite(scale) and abs(scale) <= MOST_GUIDANCE):
        raise KitError(f"--guidance must be a finite number of at most {MOST_GUIDANCE:g}, not {scale}")
    return scale


def check_whole(option: str, number: int, least: int, most: int) -> int:
    """``number``; KitError unless it lies between the two."""
    if number < least:
        raise KitError(f"{option} must be at least {least}, not {number}")
    if number > most:
        raise KitError(f"{option} must be at most {most}, not {number}")
    return number


def given_options(context: typer.Context) -> set[str]:
    """The names of the arguments and options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@contextlib.contextmanager
def reading_results(place: object) -> Iterator[None]:
    """A results file that is JSON of the right outline and yet not what the kit writes is one plain line."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise KitError(f"{place} is not what imagen-kit writes, or is damaged; measure again") from error


def find_device(name: str | None) -> torch.device:
    """The device called ``name``; KitError when this machine has none such."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KitError(f"--device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def build(recipe: Recipe, device: str | None, dtype: str) -> Pipeline:
    """The recipe's parts with their weights, on a device and in a precision as the options give them."""
    where, precision = find_device(device), find_dtype(dtype)
    with working(f"loading {recipe.name}"):
        return recipe.build(where, precision)


def find_dtype(name: str) -> str:
    """fp32, bf16, fp16 or auto; KitError for another precision."""
    from imagen_kit.performance.options import DTYPES

    if name not in DTYPES:
        raise KitError("--dtype: " + unknown("precision", name, DTYPES))
    return name


class Interrupted(Exception):
    """Ctrl-C stopped a command; the message says what is left of its work and how to go on."""


def interruptible(
    advice: Callable[[Mapping[str, Any]], str],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: Ctrl-C ends it with exit code 130 and one line, ``interrupted: `` and the advice.

    Args:
        advice: what is left of the work and how to go on, from the command's arguments by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def guarded(*args: Any, **given: Any) -> None:
            try:
                command(*args, **given)
            except KeyboardInterrupt as error:
                raise Interrupted(advice(given)) from error

        return guarded

    return decorate


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on the terminal while something loads; silent elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield

"""``imagen-kit compare``: quality against cost of samplers on one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagen_kit.cli import common
from imagen_kit.cli.evaluate import LANGUAGES
from imagen_kit.errors import KitError, unknown
from imagen_kit.files import require_writable


def compare(
    recipe: common.RecipeArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="For results.json and tradeoff.png.")
    ],
    samplers: Annotated[
        str, typer.Option("--samplers", help="Comma-separated names.")
    ] = "ddim,dpmpp_2m,heun,euler_ancestral",
    steps: Annotated[str, typer.Option("--steps", help="Comma-separated numbers of steps.")] = "5,10,20",
    count: Annotated[int, typer.Option("-n", "--num", help="Captions drawn at each setting.")] = 50,
    language: Annotated[str, typer.Option("--language", help="Of the captions: en or zh.")] = "en",
    seed: Annotated[int, typer.Option("--seed", help="Of captions and pictures.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures at a time.")] = 50,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "fp32",
    assignments: common.SetOption = None,
) -> None:
    """Draw the same captions from the same noise with each sampler and number of steps, and compare.

    Written down: accuracy by the judge, distance to the converged picture, network evaluations and seconds.
    A run that was stopped goes on where it was when the same command is given again.
    """
    names, numbers = [word.strip() for word in samplers.split(",") if word.strip()], parse_steps(steps)
    if not names:
        raise KitError("--samplers is empty; imagen-kit list samplers shows what there is")
    if count < 1 or batch_size < 1:
        raise KitError(f"--num and --batch-size must be at least 1, not {min(count, batch_size)}")
    if language not in LANGUAGES:
        raise KitError("--language: " + unknown("language", language, LANGUAGES))
    for name in names:  # each must exist and fit the recipe's schedule before the first picture is drawn
        for number in (min(numbers), max(numbers)):
            common.load_recipe(recipe, assignments, name, number)
    require_writable(output, folder=True, make=False)
    checked = common.load_recipe(recipe, assignments)
    where, precision = common.find_device(device), common.find_dtype(dtype)
    with common.working(f"loading {checked.name}"):
        from imagen_kit.evaluation import compare as comparison

        pipeline = checked.build(where, precision)
    comparison.run(
        pipeline,
        names,
        numbers,
        output,
        n=count,
        seed=seed,
        language=language,
        batch_size=batch_size,
        name=checked.name,
        progress=True,
    )


def parse_steps(text: str) -> list[int]:
    """``"5,10,20"`` → [5, 10, 20]; KitError unless all are whole numbers of at least 1."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise KitError(f"--steps must be whole numbers of at least 1 with commas between, not {text!r}")
    return sorted({int(word) for word in words})

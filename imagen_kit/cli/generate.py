"""``imagen-kit generate``: prompts to picture files."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError
from imagen_kit.files import require_writable

if TYPE_CHECKING:
    from imagen_kit.pipeline import Pipeline


@common.interruptible(lambda _: "no picture was written; the same command draws the same ones")
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; each prompt in quotes.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE_OR_DIR", help="A .png, .jpg or .webp file, or a folder."
        ),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe's name, or a YAML file of your own.")
    ] = "pocket-imagen",
    sampler: common.SamplerOption = None,
    steps: common.StepsOption = None,
    guidance: common.GuidanceOption = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the first picture of each prompt; the others count on.")
    ] = 0,
    num: Annotated[int, typer.Option("--num", help="Pictures a prompt.")] = 1,
    negative: Annotated[str | None, typer.Option("--negative", help="What guidance leads away from.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also", metavar="TEXT:WEIGHT", help="A further prompt and its weight, as often as wanted."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Most pictures at a time.")] = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "auto",
    assignments: common.SetOption = None,
) -> None:
    """Draw pictures of prompts.

    The same prompt, seed and settings give the same picture, whatever else is drawn with it.
    """
    from imagen_kit.performance.compiling import compile_seconds

    for place, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise KitError(f"prompt {place} is empty")
    common.check_whole("--num", num, 1, common.MOST_PICTURES // len(prompts))
    if batch_size is not None:
        common.check_whole("--batch-size", batch_size, 1, common.MOST_PICTURES)
    _require_places(output, len(prompts) * num)
    scale = common.check_guidance(guidance)
    further = [_weighted(text) for text in also or ()]
    pipeline = common.build(common.load_recipe(recipe, assignments, sampler, steps), device, dtype)
    typer.echo(_how(pipeline), err=True)
    began = time.perf_counter()
    images = pipeline(
        prompts,
        negative=negative,
        also=further,
        seed=seed,
        num=num,
        guidance=scale,
        batch_size=batch_size,
        progress=True,
    )
    seconds = time.perf_counter() - began
    for path in images.save(output):
        typer.echo(path)
    compiling = sum(compile_seconds(stage.denoiser) for stage in pipeline.stages)
    spent = f", {compiling:.1f} s of them compiling" if compiling else ""
    typer.echo(f"{len(images)} picture{'s' * (len(images) != 1)} in {seconds:.1f} s{spent}", err=True)


def _require_places(output: Path, count: int) -> None:
    """KitError unless ``count`` pictures can be written there."""
    from imagen_kit.images import output_paths

    try:
        for path in output_paths(output, count):
            if path.is_dir():
                raise KitError(f"cannot write {path}: it is a folder")
        require_writable(path.parent, folder=True, make=False)
    except OSError as error:  # a name that the file system refuses
        raise KitError(f"cannot write {output}: {error.strerror}") from error


def _how(pipeline: Pipeline) -> str:
    """``cpu, 2 threads: base bf16 channels-last eager, sr channels-last eager``."""
    from imagen_kit.performance.automatic import machine

    stages = [f"{stage.name} {stage.performance.brief()}" for stage in pipeline.stages]
    return f"{machine(pipeline.device)}: {', '.join(stages)}"


def _weighted(text: str) -> tuple[str, float]:
    """``watercolour:2`` as (text, weight)."""
    prompt, colon, weight = text.rpartition(":")
    try:
        if colon and prompt.strip() and math.isfinite(float(weight)):
            return prompt, float(weight)
    except ValueError:
        pass
    raise KitError(f"--also must be TEXT:WEIGHT, such as 'watercolour:2', not {text!r}")

"""``imagen-kit compare``: quality against cost of samplers on one recipe or analytic problem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError
from imagen_kit.files import require_writable

PICTURES, SAMPLES = 50, 1000  # of a cell, by default


def compare(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|analytic:PROBLEM",
            help="A shipped recipe, a YAML file, or a problem with a known answer: "
            "analytic:gmm2d, gmm_image, gaussian, points.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="For results.json, report.html and tradeoff.png."),
    ] = None,
    samplers: Annotated[
        str,
        typer.Option("--samplers", help="Comma-separated; with options as in ddim:eta=1:spacing=karras."),
    ] = "ddim,dpmpp_2m,heun,euler_ancestral",
    caches: Annotated[
        str | None,
        typer.Option(
            "--caches",
            help="Step caches to draw with each sampler: none,deep_cache:every=3,first_block; the recipe's by default.",
        ),
    ] = None,
    steps: Annotated[str | None, typer.Option("--steps", help="Comma-separated; 5,10,20 by default.")] = None,
    nfe: Annotated[
        str | None,
        typer.Option("--nfe", help="Budgets in network evaluations instead of steps, comma-separated."),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            "--guidance", help="Comma-separated scales of the first stage; the recipe's by default."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Comma-separated: each repeats all with other noise.")
    ] = "0",
    spacing: Annotated[
        str | None, typer.Option("--spacing", help="Time grid of all samplers; the recipe's by default.")
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="Of an analytic problem, e.g. edm or flow:shift=3.")
    ] = "flow",
    count: Annotated[
        int | None,
        typer.Option("-n", "--num", help=f"Pictures ({PICTURES}) or samples ({SAMPLES}) at each setting."),
    ] = None,
    language: Annotated[str, typer.Option("--language", help="Of the captions: en or zh.")] = "en",
    split: Annotated[
        str, typer.Option("--split", help="Of the captions: held_out, train or all.")
    ] = "held_out",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="One a line, in place of captions.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures at a time.")] = 50,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="What counts as converged: SAMPLER@STEPS (dpmpp_3m@128), or exact (analytic)."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="For FID, KID, precision and recall: judge, pixels, timm:MODEL@FILE, open_clip:MODEL@FILE, "
            "none; the judge's by default for captions.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What they compare with: pocket, or folder:path=DIR.")
    ] = None,
    real: Annotated[
        int | None, typer.Option("--data-num", help="Most real pictures or samples to compare with.")
    ] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(
            "--lpips", metavar="FILE", help="LPIPS with these torchvision weights of alexnet or vgg16."
        ),
    ] = None,
    shown: Annotated[int, typer.Option("--thumbnails", help="Pictures of each setting in the report.")] = 4,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="[QUALITY=]VALUE",
            help="Say what is cheapest for this; repeatable, e.g. fid=20.",
        ),
    ] = None,
    redraw: Annotated[
        Path | None,
        typer.Option("--redraw", metavar="DIR", help="Only draw report and plot again from DIR's results."),
    ] = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "fp32",
    assignments: common.SetOption = None,
) -> None:
    """Draw the same captions from the same noise with each sampler, cache, budget, guidance scale and seed; compare.

    Written down: distance to the converged picture, distances to the data, accuracy by the judge; network
    evaluations, seconds and memory. A run that was stopped goes on where it was when the same command is given
    again.
    """
    given = _given(context)
    if redraw is not None:
        _redraw(redraw, targets or [], given)
        return
    if target is None or output is None:
        raise KitError("compare needs a recipe (or analytic:PROBLEM) and -o DIR; or --redraw DIR")
    budget, counts = _budget(steps, nfe)
    scales = [None] if guidance is None else parse_numbers("--guidance", guidance)
    repeats = parse_whole("--seeds", seeds, least=0)
    names = parse_samplers(samplers)
    cached = None if caches is None else parse_samplers(caches, "caches")
    bounds = (("--num", count, 1), ("--batch-size", batch_size, 1), ("--data-num", real, 1))
    for option, number, least in (*bounds, ("--thumbnails", shown, 0)):
        if number is not None and number < least:
            raise KitError(f"{option} must be at least {least}, not {number}")
    require_writable(output, folder=True, make=False)
    from imagen_kit.cli import comparing

    chosen = comparing.choose(
        target,
        comparing.Request(
            samplers=names,
            caches=cached,
            counts=counts if budget == "steps" else [1],
            given=given,
            spacing=spacing,
            schedule=schedule,
            n=count or (SAMPLES if target.startswith(comparing.ANALYTIC) else PICTURES),
            captions={"language": language, "split": split},
            prompts=prompts,
            batch_size=batch_size,
            measured={"features": features, "data": data, "real": real, "lpips": lpips},
            machine={"device": device, "dtype": dtype},
            assignments=assignments or (),
        ),
    )
    from imagen_kit.evaluation import compare as comparison

    results = comparison.run(
        chosen.subject,
        chosen.entries,
        counts,
        output,
        budget=budget,
        guidance=scales,
        seeds=repeats,
        reference=reference,
        measures=chosen.measures,
        shown=shown,
        targets=targets or (),
        progress=True,
    )
    _conclude(results, output)


def _given(context: typer.Context) -> set[str]:
    """The names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _redraw(folder: Path, targets: list[str], given: set[str]) -> None:
    others = sorted(given - {"redraw", "targets"})
    if others:
        raise KitError(f"--redraw draws what was measured and takes only --target; leave out {others[0]!r}")
    from imagen_kit.evaluation import compare as comparison

    _conclude(comparison.redraw(folder, targets), folder)


def _conclude(results: dict[str, Any], folder: Path) -> None:
    """The files, what was left out, and the sentences a user wants."""
    for skipped in results.get("skipped", ()):
        typer.echo(f"left out: {skipped['why']}", err=True)
    failed = [cell for cell in results["cells"] if "failed" in cell]
    for cell in failed:
        typer.echo(f"failed: {cell['sampler']} with {cell['steps']} steps: {cell['failed']}", err=True)
    typer.echo(f"{folder / 'report.html'}  {folder / 'tradeoff.png'}  {folder / 'results.json'}")
    for answer in results["answers"]:
        typer.echo(answer["text"])


def _budget(steps: str | None, nfe: str | None) -> tuple[str, list[int]]:
    if steps is not None and nfe is not None:
        raise KitError("give --steps or --nfe, not both")
    if nfe is not None:
        return "nfe", parse_whole("--nfe", nfe, least=1)
    return "steps", parse_whole("--steps", "5,10,20" if steps is None else steps, least=1)


def parse_samplers(text: str, kind: str = "samplers") -> list[str]:
    """``"ddim, heun"`` → ["ddim", "heun"]; KitError for none."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise KitError(f"--{kind} is empty; imagen-kit list {kind} shows what there is")
    return list(dict.fromkeys(names))


def parse_whole(option: str, text: str, least: int) -> list[int]:
    """``"5,10,20"`` → [5, 10, 20], sorted; KitError unless all are whole numbers of at least ``least``."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise KitError(
            f"{option} must be whole numbers of at least {least} with commas between, not {text!r}"
        )
    return sorted({int(word) for word in words})


def parse_numbers(option: str, text: str) -> list[float]:
    """``"1,1.5"`` → [1.0, 1.5] in that order; KitError unless all are finite numbers."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise KitError(f"{option} must be finite numbers with commas between, not {text!r}")
    return list(dict.fromkeys(numbers))

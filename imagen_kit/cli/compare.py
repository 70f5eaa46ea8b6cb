"""``imagen-kit compare``: quality against cost of samplers on one recipe or analytic problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from imagen_kit.cli import common
from imagen_kit.cli import compare_options as words
from imagen_kit.errors import KitError
from imagen_kit.files import require_writable


def _going_on(given: Mapping[str, Any]) -> str:
    """What to do after Ctrl-C."""
    from imagen_kit.evaluation.store import RESULTS

    kept = Path(given["output"] or given["redraw"] or "") / RESULTS
    if kept.exists():
        return f"what was measured is in {kept}; the same command goes on with the rest"
    return "nothing was measured yet, and the same command begins anew"


@common.interruptible(_going_on)
def compare(
    context: typer.Context,
    target: words.Target = None,
    output: words.Output = None,
    samplers: words.Samplers = "ddim,dpmpp_2m,heun,euler_ancestral",
    caches: words.Caches = None,
    steps: words.Steps = None,
    nfe: words.Nfe = None,
    guidance: words.Guidance = None,
    seeds: words.Seeds = "0",
    spacing: words.Spacing = None,
    schedule: words.Schedule = "flow",
    count: words.Count = None,
    language: words.Language = "en",
    split: words.Split = "held_out",
    prompts: words.Prompts = None,
    batch_size: words.BatchSize = 50,
    reference: words.Reference = None,
    features: words.Features = None,
    data: words.Data = None,
    real: words.Real = None,
    lpips: words.Lpips = None,
    shown: words.Shown = 4,
    targets: words.Targets = None,
    redraw: words.Redraw = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "fp32",
    assignments: common.SetOption = None,
) -> None:
    """Draw the same captions from the same noise with each sampler, cache, budget, guidance scale and seed; compare.

    Written down: distance to the converged picture, distances to the data, accuracy by the judge; network
    evaluations, seconds and memory. A run that was stopped goes on where it was when the same command is given
    again.
    """
    given = common.given_options(context)
    if redraw is not None:
        _redraw(redraw, targets or [], given)
        return
    if target is None or output is None:
        raise KitError("compare needs a recipe (or analytic:PROBLEM) and -o DIR; or --redraw DIR")
    budget, counts = _budget(steps, nfe)
    scales = [None] if guidance is None else parse_numbers("--guidance", guidance)
    repeats = parse_whole("--seeds", seeds, least=0)
    common.check_whole("--seeds", repeats[-1], 0, common.MOST_SEED)
    names = parse_samplers(samplers)
    cached = None if caches is None else parse_samplers(caches, "caches")
    bounds = (("--num", count, 1), ("--batch-size", batch_size, 1), ("--data-num", real, 1))
    for option, number, least in (*bounds, ("--thumbnails", shown, 0)):
        if number is not None:
            common.check_whole(option, number, least, common.MOST_PICTURES)
    require_writable(output, folder=True, make=False)
    from imagen_kit.cli import comparing
    from imagen_kit.evaluation import compare as comparison

    request = comparing.Request(
        samplers=names,
        caches=cached,
        counts=counts if budget == "steps" else [1],
        given=given,
        spacing=spacing,
        schedule=schedule,
        n=count or (words.SAMPLES if target.startswith(comparing.ANALYTIC) else words.PICTURES),
        captions={"language": language, "split": split},
        prompts=prompts,
        batch_size=batch_size,
        measured={"features": features, "data": data, "real": real, "lpips": lpips},
        machine={"device": device, "dtype": dtype},
        assignments=assignments or (),
    )
    chosen = comparing.choose(target, request)
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


def _redraw(folder: Path, targets: list[str], given: set[str]) -> None:
    others = sorted(given - {"redraw", "targets"})
    if others:
        raise KitError(f"--redraw draws what was measured and takes only --target; leave out {others[0]!r}")
    from imagen_kit.evaluation import compare as comparison

    with common.reading_results(folder):
        results = comparison.redraw(folder, targets)
    _conclude(results, folder)


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

"""``imagen-kit bench``: speed and memory of parts and recipes, beside others that do the same work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError, unknown
from imagen_kit.files import require_writable

if TYPE_CHECKING:
    import torch

    from imagen_kit.bench.engine import Plan

WEIGHTS = ("real", "random")


def _going_on(given: Mapping[str, Any]) -> str:
    """What to do after Ctrl-C."""
    from imagen_kit.bench.store import results_file

    kept = None if given["output"] is None else results_file(given["output"])
    if kept is None or not kept.exists():
        return "nothing was measured yet, and the same command begins anew"
    without = " without --fresh" if given["fresh"] else ""
    return f"finished rows are in {kept}; the same command{without} goes on with the others"


@common.interruptible(_going_on)
def bench(
    context: typer.Context,
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Recipes to measure, whole and part by part."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR|FILE.json",
            help="For the results; a picture's file for --roofline.",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="quick, cpu, gpu, full, or a YAML file of your own.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Rows whose id contains this, or matches it with * and ?.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="SECONDS", help="No row begins later; the next call goes on."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="Of every row, in place of the suite's own rule.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Overwrite older results.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the rows.")] = False,
    weights: Annotated[
        str, typer.Option("--weights", help="Of recipes: real, or random (nothing is downloaded).")
    ] = "real",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A.json B.json", help="What differs between two results."),
    ] = None,
    roofline: Annotated[
        Path | None,
        typer.Option(
            "--roofline", metavar="RESULTS", help="Draw results against the ceilings, with -o FILE.png."
        ),
    ] = None,
    growth: Annotated[
        Path | None,
        typer.Option(
            "--growth", metavar="RESULTS", help="Exponents of time and memory in batch, size, steps."
        ),
    ] = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "fp32",
    assignments: common.SetOption = None,
) -> None:
    """Measure rows and keep them in a results file; what is in it already is not measured again.

    Every row has median and spread after a warm-up, memory, counted FLOPs and bytes as shares of the ceilings
    measured first, and the same work done by peers, with the difference of the results.
    """
    readers = {"--compare": compare, "--roofline": roofline, "--growth": growth}
    given = [name for name, value in readers.items() if value is not None]
    work = [*(["--suite"] if suite else []), *(["recipes"] if recipes else [])]
    if len(given) + len(work) != 1:
        what = " and ".join([*work, *given]) or "nothing"
        raise KitError(
            f"bench takes recipes, --suite, --compare, --roofline or --growth, one of them; given: {what}"
        )
    _require_fitting(common.given_options(context), bool(given), suite is not None)
    if given:
        with common.reading_results(compare or roofline or growth):
            _read(compare, roofline, growth, output)
        return
    where = common.find_device(device)
    if suite is not None:
        plan = _suite_plan(suite, where, only)
    else:
        plan = _recipe_plan(recipes or [], where, weights, dtype, assignments or [], only)
    if repeats is not None:
        if repeats < 2:
            raise KitError(f"--repeats must be at least 2, not {repeats}")
        plan = replace(plan, protocol=replace(plan.protocol, least=repeats, most=repeats))
    if budget is not None and not budget > 0:
        raise KitError(f"--budget must be more than 0 seconds, not {budget:g}")
    _run(replace(plan, budget=budget), output, fresh, dry_run)


def _require_fitting(given: set[str], reads: bool, suite: bool) -> None:
    """KitError for an option that would do nothing beside the others."""
    of_recipes = [name for name in ("weights", "dtype", "assignments") if name in given]
    of_rows = [name for name in ("only", "budget", "repeats", "fresh", "dry_run", "device") if name in given]
    spoken = {"assignments": "--set", "dry_run": "--dry-run"}
    if suite and of_recipes:
        raise KitError(
            f"{spoken.get(of_recipes[0], '--' + of_recipes[0])} is for recipes; a suite has its own"
        )
    if reads and (of_recipes or of_rows):
        idle = (of_recipes + of_rows)[0]
        raise KitError(
            f"{spoken.get(idle, '--' + idle)} is for measuring; leave it out where results are read"
        )


def _read(
    compare: tuple[Path, Path] | None, roofline: Path | None, growth: Path | None, output: Path | None
) -> None:
    """What is made of results that are there."""
    from imagen_kit.bench import comparison, store
    from imagen_kit.bench import growth as fitted
    from imagen_kit.bench import roofline as drawing

    if compare is not None:
        typer.echo(comparison.compare(*compare))
    elif growth is not None:
        typer.echo(fitted.text(store.read(growth)))
    elif roofline is not None:
        if output is None:
            raise KitError("--roofline needs -o FILE.png")
        if output.suffix not in (".png", ".pdf", ".svg"):
            raise KitError(f"-o must be a .png, .pdf or .svg file, not {output}")
        require_writable(output)
        drawing.draw(store.read(roofline), output)
        typer.echo(output)


def _suite_plan(name: str, where: torch.device, only: str | None) -> Plan:
    from imagen_kit.bench import suite
    from imagen_kit.bench.engine import Plan

    chosen = suite.load(name, where)
    if not chosen.cases:
        raise KitError(f"suite {name} has no row for a {where.type} device")
    if only is not None:
        chosen = chosen.only(only)
    return Plan(chosen.cases, where, chosen.protocol, chosen.name, one_process=chosen.one_process)


def _recipe_plan(
    names: list[str], where: torch.device, weights: str, dtype: str, changes: list[str], only: str | None
) -> Plan:
    from imagen_kit.bench import recipes, suite
    from imagen_kit.bench.engine import Plan

    if weights not in WEIGHTS:
        raise KitError("--weights: " + unknown("choice", weights, WEIGHTS))
    common.find_dtype(dtype)
    cases = []
    for name in names:
        found, left_out = recipes.cases(name, weights=weights, dtype=dtype, changes=changes)
        cases += found
        for line in left_out:
            typer.echo(f"left out: {line}", err=True)
    chosen = suite.Suite(", ".join(names), "", cases, recipes.PROTOCOL, one_process=True)
    if only is not None:
        chosen = chosen.only(only)
    return Plan(chosen.cases, where, chosen.protocol, chosen.name, one_process=True)


def _run(plan: Plan, output: Path | None, fresh: bool, dry_run: bool) -> None:
    from imagen_kit.bench import engine, table

    if dry_run:
        engine.validate(plan.cases)
        for case in plan.cases:
            typer.echo(case.id)
        return
    if output is None:
        raise KitError("bench needs -o DIR or FILE.json for its results (or --dry-run)")
    with _following(len(plan.cases)) as told:
        content = engine.run(plan, output, fresh=fresh, told=told)
    ids = {case.id for case in plan.cases}
    typer.echo(table.screen([row for row in content["rows"] if row["id"] in ids]))
    typer.echo(f"\n{table.environment(content)}\nceilings: {table.ceilings(content)}")
    left = content["not_run"]
    if left:
        typer.echo(f"{len(left)} rows did not fit into the budget; the same command goes on with {left[0]}")


@contextlib.contextmanager
def _following(total: int) -> Iterator[Callable[[dict[str, Any], int, int], None]]:
    """A progress bar on a terminal, a line a row elsewhere."""
    from imagen_kit.bench import table

    if not sys.stderr.isatty():
        yield lambda row, done, every: print(f"{done}/{every} {table.told(row)}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def told(row: dict[str, Any], done: int, every: int) -> None:
            progress.update(task, completed=done, total=every, description=table.told(row))

        yield told

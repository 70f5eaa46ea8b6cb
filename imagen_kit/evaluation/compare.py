"""Quality against cost of samplers on one model: which sampler, at how many network evaluations?

Every cell (sampler, number of steps) draws the same captions from the same noise. Measured are the judge's
accuracy, the distance to the converged picture of that noise, network evaluations and seconds.
Axes: b pictures, c h w.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from imagen_kit.data.pocket import Scene, caption
from imagen_kit.errors import KitError, unknown
from imagen_kit.evaluation.drawing import GRID_OPTIONS, Drawn, draw, fingerprint, make_sampler
from imagen_kit.evaluation.judge import Judge
from imagen_kit.evaluation.plot import tradeoff
from imagen_kit.evaluation.pocket import draw_scenes, summary
from imagen_kit.evaluation.provenance import device_name, provenance, write_json
from imagen_kit.files import replacing, require_writable
from imagen_kit.pipeline import Pipeline, Stage

FORMAT = 1  # of results.json


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two batches of pictures in [0, 1], in the same units."""
    return (a.double() - b.double()).square().mean().sqrt().item()


class Comparison:
    """One results folder: what has been measured, and how to measure the rest.

    Args:
        pipeline: the model.
        out: the folder.
        settings: everything that must be equal for numbers to stand in one table.
        scenes: what is drawn.
        batch_size: pictures at a time.

    Raises:
        KitError: the folder holds results of other settings, or cannot be written.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        settings: dict[str, Any],
        scenes: list[Scene],
        batch_size: int | None,
    ):
        self.pipeline, self.out, self.scenes, self.batch_size = pipeline, out, scenes, batch_size
        self.prompts = [caption(scene, settings["language"]) for scene in scenes]
        self.seeds = [settings["seed"] + i for i in range(len(scenes))]
        self.judge = Judge()
        require_writable(out, folder=True)
        self.results = self._resume(settings)

    @property
    def _file(self) -> Path:
        return self.out / "results.json"

    def _resume(self, settings: dict[str, Any]) -> dict[str, Any]:
        fresh = {"format": FORMAT, "settings": settings, "reference": None, "cells": []}
        if not self._file.exists():
            return fresh
        try:
            old = json.loads(self._file.read_text(encoding="utf-8"))
            before, cells = old["settings"], old["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KitError(f"{self._file} is not a comparison's results; choose another folder") from error
        # through JSON, so that tuples and lists compare equal
        now = json.loads(json.dumps(settings))
        changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
        if changed:
            key = changed[0]
            raise KitError(
                f"{self._file} was made with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                "choose another folder, or delete it"
            )
        return {**fresh, "reference": old.get("reference"), "cells": cells}

    def done(self, sampler: str, steps: int) -> bool:
        """Has this cell been measured?"""
        return any(cell["sampler"] == sampler and cell["steps"] == steps for cell in self.results["cells"])

    def _draw(self, sampler: Any, steps: int, tick: Callable[[], None]) -> Drawn:
        return draw(self.pipeline, self.prompts, self.seeds, sampler, steps, self.batch_size, tick)

    def reference(self, sampler: Any, steps: int, tick: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """The converged pictures (first stage, final), drawn once and kept beside the results."""
        file = self.out / "reference.safetensors"
        if self.results["reference"] is not None and file.exists():
            few = slice(self.batch_size)
            draw(
                self.pipeline, self.prompts[few], self.seeds[few], sampler, 1
            )  # warms up, as the reference does
            kept = load_file(file)
            return kept["first"], kept["final"]
        drawn = self._draw(sampler, steps, tick)
        with replacing(file) as temporary:
            save_file({"first": drawn.first.contiguous(), "final": drawn.final.contiguous()}, temporary)
        self.results["reference"] = self._row(drawn)
        self._save()
        return drawn.first, drawn.final

    def measure(
        self, name: str, sampler: Any, steps: int, reference: tuple[Tensor, Tensor], tick: Callable[[], None]
    ) -> None:
        """Draw one cell and write the results at once, so that a stopped run loses one cell at most."""
        drawn = self._draw(sampler, steps, tick)
        cell = {
            "sampler": name,
            "steps": steps,
            "order": getattr(sampler, "order", None),
            "stochastic": bool(getattr(sampler, "stochastic", False)),
            **self._row(drawn),
            "rmse_first": rms(drawn.first, reference[0]),
            "rmse_final": rms(drawn.final, reference[1]),
        }
        self.results["cells"].append(cell)
        self._save()

    def _row(self, drawn: Drawn) -> dict[str, Any]:
        base = self.pipeline.stages[0].name
        return {
            "nfe": drawn.calls[base],
            "nfe_all_stages": sum(drawn.calls.values()),
            "evaluations_per_picture": drawn.rows[base],
            "seconds": round(drawn.seconds, 4),
            "seconds_per_picture": round(drawn.seconds / len(self.prompts), 5),
            **summary(self.judge.score(drawn.final, self.scenes), self.scenes),
        }

    def _save(self) -> None:
        self.results["provenance"] = provenance(self.pipeline.device)
        write_json(self._file, self.results)


def run(
    pipeline: Pipeline,
    samplers: Sequence[str] | Mapping[str, Any],
    steps: Sequence[int],
    out: str | Path,
    *,
    n: int = 50,
    seed: int = 0,
    split: str = "held_out",
    language: str = "en",
    budget: str = "steps",
    reference: tuple[str, int] = ("dpmpp_3m", 128),
    batch_size: int | None = 50,
    name: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Compare samplers; write ``results.json``, ``tradeoff.png`` and ``reference.safetensors`` to a folder.

    Run again with the same settings it does only the cells that are missing, so samplers can be added later.

    Args:
        pipeline: the model; its first stage's sampler is swapped, later stages keep theirs.
        samplers: registered names, which keep the recipe's spacing; or label → sampler object.
        steps: numbers of steps, or of network evaluations.
        out: the folder.
        n, split, seed, language: which captions, as in ``pocket.evaluate``; picture i has seed ``seed + i``.
        budget: what ``steps`` counts. ``nfe``: each sampler takes as many steps as need no more evaluations.
        reference: (sampler, steps) whose pictures count as converged; a deterministic sampler of high order.
        batch_size: pictures at a time; None = all.
        name: the recipe's name, for the record.
        progress: show a bar over network calls.

    Returns:
        The content of ``results.json``: ``settings``, ``reference``, ``cells`` and ``provenance``. A cell has
        ``sampler``, ``steps``, ``nfe`` (calls of the first stage's network for a batch, counted at the
        network), ``rmse_first`` and ``rmse_final`` (to the converged pictures, in [0, 1]), ``seconds``, and
        ``accuracy`` by attribute.

    Raises:
        KitError: an unknown sampler or one that does not fit, numbers below 1, a folder with other results.
    """
    base = pipeline.stages[0]
    named = (
        samplers
        if isinstance(samplers, Mapping)
        else {label: make_sampler(base, label) for label in samplers}
    )
    cells = _plan(base, named, steps, budget)
    settings = {
        "recipe": name,
        "model": fingerprint(pipeline),
        "grid": {key: getattr(base.sampler, key) for key in GRID_OPTIONS if hasattr(base.sampler, key)},
        "n": n,
        "split": split,
        "seed": seed,
        "language": language,
        "reference": list(reference),
        "device": device_name(pipeline.device),
    }
    work = Comparison(pipeline, Path(out), settings, draw_scenes(n, split, seed), batch_size)
    best, best_steps = make_sampler(base, reference[0]), reference[1]
    todo = [(label, count) for label, count in cells if not work.done(label, count)]
    wanted = [(best, best_steps)] if work.results["reference"] is None else []
    wanted += [(named[label], count) for label, count in todo]
    later = sum(stage.sampler.tableau(stage.schedule, stage.steps).nfe for stage in pipeline.stages[1:])
    batches = -(-n // (batch_size or n))
    total = sum(sampler.tableau(base.schedule, count).nfe + later for sampler, count in wanted) * batches
    with _bar(total if progress else 0) as tick:
        if todo:
            converged = work.reference(best, best_steps, tick)
        for label, count in todo:
            work.measure(label, named[label], count, converged, tick)
    tradeoff(work.results, work.out / "tradeoff.png")
    return work.results


def _plan(
    base: Stage, samplers: Mapping[str, Any], steps: Sequence[int], budget: str
) -> list[tuple[str, int]]:
    """(label, steps) of every cell, each sampler traced on the schedule so that a misfit is told at once."""
    if budget not in ("steps", "nfe"):
        raise KitError(unknown("budget", budget, ("steps", "nfe")))
    if not samplers or not steps:
        raise KitError("a comparison needs at least one sampler and one number of steps")
    cells: list[tuple[str, int]] = []
    for label, sampler in samplers.items():
        for count in steps:
            cell = (label, sampler.steps_for(count) if budget == "nfe" else count)
            sampler.tableau(base.schedule, cell[1])
            if cell not in cells:
                cells.append(cell)
    return cells


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over ``total`` network calls, or nothing when that is 0; yields its tick."""
    if not total:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("comparing", total=total)
        yield lambda: bar.advance(task)

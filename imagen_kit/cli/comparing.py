"""From the words of ``imagen-kit compare`` to what is compared: everything is checked before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_kit.cli import common
from imagen_kit.cli.evaluate import LANGUAGES, SPLITS
from imagen_kit.errors import KitError, unknown
from imagen_kit.evaluation import features, likeness, spec, subjects
from imagen_kit.evaluation.measures import REAL, Measures
from imagen_kit.evaluation.spec import Entry
from imagen_kit.evaluation.subjects import POCKET, AnalyticSubject, RecipeSubject, Subject

ANALYTIC = "analytic:"
LEAST_FOR_FEATURES = 16  # pictures; fewer say nothing of a distribution, so by default it is not asked
SAMPLES = 2000  # real ones that an analytic problem's are compared with, by default
ONLY_RECIPES = {
    "caches": "--caches",
    "language": "--language",
    "split": "--split",
    "prompts": "--prompts",
    "batch_size": "--batch-size",
    "guidance": "--guidance",
    "features": "--features",
    "data": "--data",
    "lpips": "--lpips",
    "device": "--device",
    "dtype": "--dtype",
    "assignments": "--set",
}


@dataclass(frozen=True)
class Request:
    """What stands on the command line.

    Attributes:
        samplers: with options, see ``spec.parse_part``.
        caches: likewise, or ``none``; None for the recipe's own.
        counts: steps that each sampler must be able to take.
        given: names of the options that were written down.
        spacing, schedule, n, prompts, batch_size, assignments: the options of these names.
        captions: ``language`` and ``split``.
        measured: ``features``, ``data``, ``real`` and ``lpips``.
        machine: ``device`` and ``dtype``.
    """

    samplers: Sequence[str]
    caches: Sequence[str] | None
    counts: Sequence[int]
    given: set[str]
    spacing: str | None
    schedule: str
    n: int
    captions: Mapping[str, str]
    prompts: Path | None
    batch_size: int
    measured: Mapping[str, Any]
    machine: Mapping[str, Any]
    assignments: Sequence[str]

    @property
    def grid(self) -> dict[str, Any]:
        """Grid options for all samplers."""
        return {} if self.spacing is None else {"spacing": self.spacing}


@dataclass(frozen=True)
class Chosen:
    """What is compared: the model or problem, the samplers, and what is measured."""

    subject: Subject
    entries: list[Entry]
    measures: Measures


def choose(target: str, request: Request) -> Chosen:
    """Build what a target and its options name.

    Raises:
        KitError: the first option that is wrong; no weights were read by then but for a device or a feature
            extractor that is not there.
    """
    if target.startswith(ANALYTIC):
        return _analytic(target.removeprefix(ANALYTIC), request)
    return _recipe(target, request)


def _analytic(name: str, request: Request) -> Chosen:
    for key, option in ONLY_RECIPES.items():
        if key in request.given:
            raise KitError(f"{option} is for recipes; an analytic problem has none")
    subject = AnalyticSubject(name, request.schedule, request.n)
    entries = spec.make_entries(request.samplers, request.grid)
    return Chosen(subject, entries, Measures(subject, real=request.measured["real"] or SAMPLES))


def _recipe(name: str, request: Request) -> Chosen:
    if "schedule" in request.given:
        raise KitError("--schedule is for analytic problems; change a recipe's with --set")
    captions, measured = _captions(request), request.measured
    where, precision = (
        common.find_device(request.machine["device"]),
        common.find_dtype(request.machine["dtype"]),
    )
    extractor = features.parse(measured["features"] or _own_features(request))
    data = measured["data"] or (None if request.prompts else POCKET)
    if extractor is not None and data is None:
        raise KitError("--features with --prompts needs the real pictures; give --data folder:path=DIR")
    lpips = measured["lpips"]
    if lpips is not None:
        likeness.find_backbone(lpips)
    checked = common.load_recipe(name, request.assignments)
    own = checked.stages[0].sampler.options
    kept = {key: own[key] for key in spec.GRID_OPTIONS if key in own}
    entries = spec.make_entries(request.samplers, {**kept, **request.grid})
    for entry in entries:  # each must fit schedule and prediction before a weight is read
        for steps in dict.fromkeys((min(request.counts), max(request.counts))):
            part = json.dumps({**entry.part, "steps": steps})
            common.load_recipe(name, [*request.assignments, f"stages.0.sampler={part}"])
    if request.caches is not None:
        _check_caches(name, request)
        entries = spec.with_caches(entries, request.caches, own=checked.stages[0].cache is not None)
    with common.working(f"loading {checked.name}"):
        subject = RecipeSubject(
            checked.build(where, precision),
            name=checked.name,
            n=request.n,
            batch_size=request.batch_size,
            data=data,
            **captions,
        )
        measures = Measures(
            subject,
            extractor.load(where) if extractor else None,
            likeness.Lpips(lpips, where) if lpips else None,
            measured["real"] or REAL,
        )
    return Chosen(subject, entries, measures)


def _check_caches(name: str, request: Request) -> None:
    """KitError unless the recipe's first stage could have each of the caches."""
    for text in request.caches or ():
        if text != spec.NO_CACHE:
            cache, options = spec.checked("cache", text)
            part = json.dumps({"name": cache, **options})
            common.load_recipe(name, [*request.assignments, f"stages.0.cache={part}"])


def _captions(request: Request) -> dict[str, Any]:
    """What is drawn: the prompts of a file, or captions in a language and of a split."""
    language, split = request.captions["language"], request.captions["split"]
    if language not in LANGUAGES:
        raise KitError("--language: " + unknown("language", language, LANGUAGES))
    if split not in SPLITS:
        raise KitError("--split: " + unknown("split", split, SPLITS))
    if request.prompts is None:
        return dict(request.captions)
    for key in ("language", "split"):
        if key in request.given:
            raise KitError(f"--{key} chooses captions, and --prompts takes their place; give one of them")
    return {"prompts": subjects.read_prompts(request.prompts)}


def _own_features(request: Request) -> str:
    """The judge's where captions are drawn in a number that says something, else none."""
    return "judge" if request.prompts is None and request.n >= LEAST_FOR_FEATURES else features.NONE

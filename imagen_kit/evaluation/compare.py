"""Quality against cost: which sampler, at how many network evaluations, at which guidance?

Every cell (sampler, steps, guidance scale, seed) draws the same captions from the same noise as the others of
its seed. Measured are the distance to the converged result of that noise, distances to the data as
distributions, the judge's accuracy; network evaluations, seconds and peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from imagen_kit.errors import KitError, nearest, unknown
from imagen_kit.evaluation import report, spec, summary, thumbnails
from imagen_kit.evaluation.drawing import Drawn
from imagen_kit.evaluation.measures import Measures
from imagen_kit.evaluation.plot import tradeoff
from imagen_kit.evaluation.provenance import device_name, write_json
from imagen_kit.evaluation.spec import Entry
from imagen_kit.evaluation.store import RESULTS, Store, read
from imagen_kit.evaluation.subjects import Subject, draws_noise, evaluations, exact_evaluations
from imagen_kit.files import require_writable

BUDGETS = ("steps", "nfe")
EXACT = "exact"
THUMBNAILS = 4


@dataclass(frozen=True)
class Cell:
    """One thing to draw. ``budget`` is the number that was asked for, of steps or of evaluations."""

    entry: Entry
    steps: int
    guidance: float | None
    seed: int
    budget: dict[str, int] = field(default_factory=dict, compare=False, hash=False)

    @property
    def key(self) -> dict[str, Any]:
        return {
            "sampler": self.entry.label,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }


def run(
    subject: Subject,
    samplers: Sequence[Entry],
    counts: Sequence[int],
    out: str | Path,
    *,
    budget: str = "steps",
    guidance: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    reference: str | None = None,
    measures: Measures | None = None,
    shown: int = THUMBNAILS,
    targets: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Compare samplers; write ``results.json``, ``tradeoff.png`` and ``report.html`` to a folder.

    Run again with the same settings it does only the cells that are missing, so that samplers, budgets,
    guidance scales and seeds can be added later. Results of other settings are never mixed in.

    Args:
        subject: the model or the analytic problem.
        samplers: see ``spec.make_entries``.
        counts: numbers of steps, or of network evaluations.
        out: the folder.
        budget: what ``counts`` counts. ``nfe``: each sampler takes as many steps as need no more evaluations;
            a budget below one step of a sampler is left out for it and listed under ``skipped``.
        guidance: scales of the first stage; None = the recipe's own guidance.
        seeds: repetitions with other noise (and other captions).
        reference: whose results count as converged: ``SAMPLER@STEPS``, or ``exact`` for an analytic problem;
            None = the subject's own.
        measures: what is measured; None = distances that need no features.
        shown: thumbnails kept of every cell.
        targets: ``QUALITY=VALUE`` that the concluding sentences are about; see ``summary.answers``.
        progress: show a bar over network calls.

    Returns:
        The content of ``results.json``: ``settings``, ``qualities``, ``samplers``, ``references``, ``cells``,
        ``answers``, ``skipped`` and ``provenance``. A cell has its ``sampler``, ``steps``, ``guidance``,
        ``seed``, and ``nfe`` (calls of the first stage's network for a batch, counted at the network), ``work``
        (the same less what a step cache left out, counted in blocks),
        ``evaluations_per_picture``, ``seconds``, ``seconds_per_picture``, ``memory`` in bytes, one number for
        each of ``qualities`` (``accuracy`` by attribute), and ``thumbnails``; or ``failed``, what the model
        said in place of pictures.

    Raises:
        KitError: an unknown sampler or one that does not fit, numbers below 1, a target that is no quality of
            this comparison, a folder with other results.
    """
    measures = measures or Measures(subject)
    method = _Method.parse(reference or subject.reference, subject)
    cells, skipped = plan(subject, samplers, counts, budget, guidance, seeds)
    qualities = measures.qualities()
    summary.parse_targets(targets, qualities)
    settings = {
        **subject.facts(),
        "reference": method.text,
        "device": device_name(subject.device),
        **measures.facts(),
    }
    store = Store(out, settings, subject.device)
    for entry in samplers:
        noisy = draws_noise(entry.sampler, subject.schedule)
        store.add_sampler(entry.label, {**entry.facts, "stochastic": noisy})
    store.content["qualities"], store.content["skipped"] = qualities, skipped
    todo = [cell for cell in cells if not store.has(**cell.key)]
    groups = list(dict.fromkeys((cell.seed, cell.guidance) for cell in todo))
    total = sum(subject.calls(cell.entry.sampler, cell.steps) for cell in todo)
    total += sum(method.calls for seed, scale in groups if store.converged(scale, seed) is None)
    if todo:
        measures.prepare()
    work = _Work(subject, measures, method, store, shown)
    with _bar(total if progress else 0) as bar:
        for seed, scale in groups:
            converged = work.converged(scale, seed, bar)
            for cell in (c for c in todo if (c.seed, c.guidance) == (seed, scale)):
                work.measure(cell, converged, bar)
    return conclude(store.content, store.folder, targets)


def redraw(folder: str | Path, targets: Sequence[str] = ()) -> dict[str, Any]:
    """Make the plot, the page and the sentences of a folder again from its ``results.json`` alone.

    Raises:
        KitError: no results there, a target that is no quality of theirs, a folder that cannot be written.
    """
    results = read(folder)
    if not results["cells"]:
        raise KitError(f"{Path(folder) / RESULTS} holds no finished setting; run the comparison first")
    summary.parse_targets(targets, results["qualities"])
    require_writable(folder, folder=True, make=False)
    return conclude(results, Path(folder), targets)


def conclude(results: dict[str, Any], folder: Path, targets: Sequence[str]) -> dict[str, Any]:
    """Answer the targets and write all files of ``folder``."""
    results["answers"] = summary.answers(results, targets)
    write_json(folder / RESULTS, results)
    tradeoff(results, folder / "tradeoff.png")
    report.write(results, folder / "report.html")
    return results


def plan(
    subject: Subject,
    samplers: Sequence[Entry],
    counts: Sequence[int],
    budget: str,
    guidance: Sequence[float | None],
    seeds: Sequence[int],
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Every cell once, seed by seed, and the budgets that are too small for a sampler.

    Each sampler is traced on the schedule, so that a misfit is told at once.

    Raises:
        KitError: nothing to do, a number below 1, guidance for what cannot be guided, a sampler that does not
            fit the schedule or cannot afford any budget.
    """
    if budget not in BUDGETS:
        raise KitError(unknown("budget", budget, BUDGETS))
    if not (samplers and counts and guidance and seeds):
        raise KitError("a comparison needs at least one sampler, one budget, one guidance scale and one seed")
    if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in counts):
        raise KitError(f"{budget} must be whole numbers of at least 1, not {', '.join(map(str, counts))}")
    if any(scale is not None and not math.isfinite(scale) for scale in guidance):
        raise KitError("guidance scales must be finite numbers")
    if any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise KitError(f"seeds must be whole numbers from 0, not {', '.join(map(str, seeds))}")
    for entry in samplers:
        for scale in guidance:
            subject.check(entry.sampler, scale, entry.cache)
    affordable: list[tuple[Entry, int, dict[str, int]]] = []
    skipped: list[dict[str, Any]] = []
    for entry in samplers:
        for count in counts:
            try:
                steps = _steps(entry.sampler, subject.schedule, count, budget)
                evaluations(entry.sampler, subject.schedule, steps)
            except _TooDear as error:
                skipped.append({"sampler": entry.label, "nfe": count, "why": str(error)})
                continue
            affordable.append((entry, steps, {budget: count}))
    for entry in samplers:
        if not any(known is entry for known, _, _ in affordable):
            raise KitError(next(s["why"] for s in skipped if s["sampler"] == entry.label))
    every = [
        Cell(entry, steps, scale, seed, asked)
        for seed in seeds
        for scale in guidance
        for entry, steps, asked in affordable
    ]
    return list(dict.fromkeys(every)), skipped


class _TooDear(KitError):
    """A budget below what one step takes."""


def _steps(sampler: Any, schedule: Any, count: int, budget: str) -> int:
    """The steps that a budget means for a sampler; _TooDear when it is below one step.

    Raises:
        KitError: a sampler that takes as many evaluations as it finds it needs.
    """
    if budget == "steps":
        return count
    least = exact_evaluations(sampler, schedule, 1)
    if least > count:
        raise _TooDear(
            f"sampler {sampler.name!r} takes {least} evaluations for one step; --nfe {count} is less"
        )
    low, high = 1, count  # dearer follows dear, so the largest affordable number is found by halving
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = exact_evaluations(sampler, schedule, middle) <= count
        except KitError:  # more steps than the schedule has times
            fits = False
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


@dataclass(frozen=True)
class _Method:
    """How converged results are made: exactly, or by a sampler with many steps."""

    text: str
    calls: int
    sampler: Any = None
    steps: int = 0

    @classmethod
    def parse(cls, text: str, subject: Subject) -> _Method:
        """From ``SAMPLER@STEPS`` or ``exact``."""
        if text == EXACT:
            if subject.pictures:
                raise KitError("--reference: 'exact' is for analytic problems; give SAMPLER@STEPS")
            return cls(text, 0)
        name, at, steps = text.rpartition("@")
        if not at or not steps.isdecimal() or int(steps) < 1:
            guess = nearest(text, (EXACT,)) if not subject.pictures else None
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise KitError(f"--reference must be SAMPLER@STEPS, e.g. dpmpp_3m@128, not {text!r}{hint}")
        sampler = spec.create("sampler", name, subject.keep())
        if draws_noise(sampler, subject.schedule):
            raise KitError(f"--reference: {name!r} is stochastic and does not converge to one picture")
        return cls(text, subject.calls(sampler, int(steps)), sampler, int(steps))


class _Work:
    """Draws cells and writes down what they are like."""

    def __init__(self, subject: Subject, measures: Measures, method: _Method, store: Store, shown: int):
        self.subject, self.measures, self.method, self.store, self.shown = (
            subject,
            measures,
            method,
            store,
            shown,
        )
        self._warm = False

    def converged(self, guidance: float | None, seed: int, bar: _Bar) -> Drawn:
        """The converged results, drawn once and kept beside the others."""
        kept = self.store.converged(guidance, seed)
        if kept is not None:
            return kept
        bar.name(f"converged, seed {seed}" + ("" if guidance is None else f", guidance {guidance:g}"))
        if self.method.sampler is None:
            exact = self.subject.exact(seed)
            assert exact is not None  # _Method.parse has seen to it
            drawn = exact
        else:
            sampler, steps = self.method.sampler, self.method.steps
            drawn = self.subject.draw(sampler, steps, guidance, seed, bar.tick, cache=None)
            self._warm = True
        row = {
            "steps": self.method.steps or None,
            "captions": self.subject.texts(seed)[: self.shown],
            **self._row(drawn, seed),
            **self.measures.distribution(drawn),
        }
        self.store.add_converged(guidance, seed, drawn, row)
        return drawn

    def measure(self, cell: Cell, converged: Drawn, bar: _Bar) -> None:
        """Draw one cell and write the results at once, so that a stopped run loses one cell at most."""
        subject, sampler = self.subject, cell.entry.sampler
        bar.name(f"{cell.entry.label}, {cell.steps} step{'s' * (cell.steps != 1)}")
        if not self._warm:  # the first run of a process pays for what later ones find ready
            subject.draw(sampler, 1, cell.guidance, cell.seed, lambda: None, cell.entry.cache)
            self._warm = True
        row = {**cell.key, "budget": cell.budget}
        try:
            drawn = subject.draw(sampler, cell.steps, cell.guidance, cell.seed, bar.tick, cell.entry.cache)
        except KitError as error:  # values that are not finite: told, and the others go on
            self.store.add({**row, "failed": str(error)})
            return
        self.store.add(
            {
                **row,
                **self._row(drawn, cell.seed),
                **self.measures.paired(drawn, converged),
                **self.measures.distribution(drawn),
            }
        )

    def _row(self, drawn: Drawn, seed: int) -> dict[str, Any]:
        first = next(iter(drawn.calls), "")
        return {
            "nfe": drawn.calls.get(first),
            "work": None if first not in drawn.calls else drawn.calls[first] * (1 - drawn.saved),
            "nfe_all_stages": sum(drawn.calls.values()) or None,
            "evaluations_per_picture": drawn.rows.get(first),
            "seconds": round(drawn.seconds, 4),
            "seconds_per_picture": round(drawn.seconds / self.subject.n, 7),
            "memory": drawn.memory,
            **self.subject.judge(drawn, seed),
            "thumbnails": thumbnails.strip(drawn.final, self.shown, self.subject.pictures),
        }


class _Bar(Protocol):
    """What the work reports its progress to."""

    def tick(self) -> None: ...
    def name(self, what: str) -> None: ...


class _Silent:
    def tick(self) -> None:
        pass

    def name(self, what: str) -> None:
        pass


@contextmanager
def _bar(total: int) -> Iterator[_Bar]:
    """A progress bar over ``total`` network calls, or nothing when that is 0."""
    if not total:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("comparing", total=total)

        class Shown:
            def tick(self) -> None:
                shown.advance(task)

            def name(self, what: str) -> None:
                shown.update(task, description=what)

        yield Shown()

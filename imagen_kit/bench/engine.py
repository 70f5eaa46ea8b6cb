"""Runs cases in worker processes and keeps their rows: ``run(cases, "results.json")``.

A worker that dies costs the row it was at; the next one goes on with the case after it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import FAILED, NO_MEMORY, Row, blank
from imagen_kit.bench.store import Results, environment
from imagen_kit.bench.subject import Case
from imagen_kit.bench.subjects import check
from imagen_kit.errors import KitError

BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); from imagen_kit.bench import worker; worker.main()"
GRACE = 45.0  # seconds that a row which began within the budget may go on after it
START_LIMIT = 300.0  # seconds for a worker to import what it needs and measure the ceilings
Told = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to run and how.

    Args:
        cases: the rows, in this order.
        device: where.
        protocol: how each is measured.
        suite: a name for it all.
        budget: seconds after which no further row begins; None for no end.
        one_process: measure all in one worker, which saves its start; otherwise each model has one of its own.
        tiny: small ceilings, to try things out.
    """

    cases: Sequence[Case]
    device: torch.device
    protocol: Protocol = field(default_factory=Protocol)
    suite: str = ""
    budget: float | None = None
    one_process: bool = False
    tiny: bool = False


def run(
    plan: Plan, output: Path, *, fresh: bool = False, told: Told = lambda row, done, total: None
) -> dict[str, Any]:
    """Measure what the results file has not yet, and answer with its content.

    Rows that did not begin within the budget are named under ``not_run``; the same call goes on with them.

    Args:
        plan: what and how.
        output: a JSON file or a folder for ``results.json``.
        fresh: overwrite older results.
        told: ``told(row, done, total)`` after every row.

    Raises:
        KitError: a case that cannot be, or results from another machine in that file.
    """
    validate(plan.cases)
    results = Results(output, environment(plan.device), plan.protocol, plan.suite, fresh)
    began, before = time.monotonic(), results.content["seconds"]
    known = results.finished()
    todo = [case for case in plan.cases if case.id not in known]
    left = list(todo)
    try:
        for _, group in itertools.groupby(todo, key=lambda case: "" if plan.one_process else case.group):
            with Crew(plan, results) as crew:
                for case in group:
                    spent = time.monotonic() - began
                    if plan.budget is not None and spent > plan.budget:
                        break
                    row = crew.measure(case, _limit(plan, spent))
                    left.remove(case)
                    results.content["seconds"] = before + time.monotonic() - began
                    results.add(row)
                    told(row, len(todo) - len(left), len(todo))
    finally:
        results.content["not_run"] = [case.id for case in left]
        results.save()
    return results.content


def _limit(plan: Plan, spent: float) -> float:
    """Seconds that the next row may take."""
    limit = plan.protocol.limit
    return limit if plan.budget is None else min(limit, plan.budget - spent + GRACE)


def validate(cases: Iterable[Case]) -> None:
    """KitError with the first thing wrong in any of the cases."""
    for case in cases:
        if faults := check(case):
            raise KitError(faults[0])


class Crew:
    """A worker at a time: a dead one is followed by another.

    Args:
        plan: device and protocol.
        results: whose ceilings are measured first where it has none.
    """

    def __init__(self, plan: Plan, results: Results):
        self.plan, self.results = plan, results
        self._worker: _Worker | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def measure(self, case: Case, limit: float) -> Row:
        """The row of a case, whatever becomes of the worker.

        Args:
            case: what to measure.
            limit: seconds after which it is given up.
        """
        try:
            worker = self._ready()
            worker.ask({"kind": case.kind, "name": case.name, "options": dict(case.options)})
            return worker.answer(limit)["row"]
        except _Died as death:
            self.dismiss()
            return blank(case, *death.verdict)
        except BaseException:
            self.dismiss(at_once=True)
            raise

    def _ready(self) -> _Worker:
        if self._worker is not None and not self._worker.alive:
            self.dismiss()
        if self._worker is None:
            worker = self._worker = _Worker()
            content = self.results.content
            setting = {"device": str(self.plan.device), "protocol": self.plan.protocol.as_dict()}
            worker.ask({**setting, "ceilings": content["ceilings"], "tiny": self.plan.tiny})
            if content["ceilings"] is None:
                content["ceilings"] = worker.answer(START_LIMIT)["ceilings"]
        return self._worker

    def dismiss(self, at_once: bool = False) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.end(at_once)


class _Died(Exception):
    """A worker is gone.

    Args:
        verdict: (status, reason) of the row it was at.
    """

    def __init__(self, verdict: tuple[str, str]):
        super().__init__(verdict[1])
        self.verdict = verdict


class _Worker:
    """A process of ``imagen_kit.bench.worker`` in a session of its own, so that Ctrl-C is for us alone."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, content: dict[str, Any]) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Died(self._verdict()) from error

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line; ``_Died`` without one after ``limit`` seconds."""
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            raise _Died((FAILED, f"took longer than {limit:.3g} s")) from None
        if not line:
            raise _Died(self._verdict())
        return json.loads(line)

    def _verdict(self) -> tuple[str, str]:
        """(status, reason) by how the process ended."""
        code = self._process.wait(timeout=30)
        if code == -signal.SIGKILL:
            return NO_MEMORY, "the system killed the process (signal 9), as it does when memory runs out"
        if code < 0:
            return FAILED, f"the process crashed: {signal.Signals(-code).name}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return FAILED, f"the process ended with code {code}" + (f": {lines[-1].strip()}" if lines else "")

    def end(self, at_once: bool = False) -> None:
        """Have it finish, and kill what it and its children leave behind."""
        if not at_once and self.alive and self._process.stdin is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError, AttributeError):
                stream.close()  # type: ignore[union-attr]

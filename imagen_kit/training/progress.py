"""The training bar: loss, examples a second and time left, on a terminal or as plain lines in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class TrainingBar:
    """A rich progress bar on a terminal; elsewhere one line every ``every`` seconds."""

    def __init__(self, steps: int, start: int, examples: int, *, enabled: bool = True, every: float = 30.0):
        self.steps, self.done, self.examples = steps, start, examples
        self.start, self.began, self.every = start, time.perf_counter(), every
        self.printed = self.began
        self.enabled = enabled
        self.bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.row = self.bar.add_task("train", total=steps, completed=start, facts="")

    def __enter__(self) -> TrainingBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, scalars: dict[str, float]) -> None:
        """One step further, showing the latest scalars."""
        self.done += 1
        if not self.enabled:
            return
        now = time.perf_counter()
        speed = (self.done - self.start) / (now - self.began)
        losses = " ".join(f"{k} {v:.4g}" for k, v in scalars.items() if k != "examples_per_second")
        facts = f"{losses}  {speed * self.examples:.0f}/s"
        if self.bar is not None:
            self.bar.update(self.row, completed=self.done, facts=facts)
        elif now - self.printed >= self.every or self.done == self.steps:
            self.printed = now
            left = (self.steps - self.done) / speed
            print(
                f"step {self.done}/{self.steps}  {facts}  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )

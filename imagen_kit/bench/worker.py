"""The process that measures: cases come in as JSON lines, finished rows go out as JSON lines.

It is a process of its own so that a case for which the system kills it, or that crashes it, costs one row.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from imagen_kit.bench.subject import Case

#: What the system's killer of processes out of memory goes by: this one before the one that keeps the results.
KILL_FIRST = "1000"
#: What CUDA and torch say when a device, or torch's part of it, is in disorder until the process ends.
BROKEN = ("CUDA error", "cudaError", "INTERNAL ASSERT FAILED", "outside graph capture", "during capture")


def main() -> None:
    """Read a setting, then cases, from the standard input until it ends; answer on the standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the rows
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(KILL_FIRST)
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    _serve(orders, answers)


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on what is asked; whoever asks is gone at the end of the input, and so is this process."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def _serve(orders: queue.SimpleQueue[dict[str, Any]], answers: TextIO) -> None:
    setting = orders.get()
    import torch

    from imagen_kit.bench import ceilings, subjects
    from imagen_kit.bench.clock import Protocol
    from imagen_kit.bench.measure import Measurer, blank

    device = torch.device(setting["device"])
    if setting["ceilings"] is None:
        setting["ceilings"] = ceilings.measure(device, setting["tiny"])
        _answer(answers, {"ceilings": setting["ceilings"]})
    measure = Measurer(subjects.build, device, Protocol.of(setting["protocol"]), setting["ceilings"])
    subjects.names()
    for number in itertools.count():
        case = Case(**orders.get())
        if number < 2:  # at first, and after the first row, which imports the rest
            gc.collect()
            gc.freeze()  # what is imported stays: looking through it for every row would take longer than small rows
        row = measure(case)
        try:
            _answer(answers, {"row": row})
        except ValueError:  # a figure that is not finite, which JSON has no word for
            _answer(answers, {"row": blank(case, "failed", "a figure is not finite")})
        if _broken(row):
            os._exit(1)  # nothing works on this device any more, in this process


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content, allow_nan=False) + "\n")


def _broken(row: dict[str, Any]) -> bool:
    told = [row["reason"], *(entry.get("reason", "") for entry in row["entries"].values())]
    return any(word in reason for word in BROKEN for reason in told)


if __name__ == "__main__":
    main()

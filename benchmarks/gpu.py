"""Everything that one GPU is asked to measure, in one go of under nine minutes.

    python benchmarks/gpu.py -o benchmarks/results/gpu.json
    python benchmarks/gpu.py -o /tmp/try.json --cpu-test

Runs the suite ``gpu`` beside the checkout it lies in; nothing is installed or downloaded, peers that are missing
are rows that say so. What did not fit into the budget is done by the same command given again with the same file.
``--cpu-test`` goes the same way on the CPU with every network replaced by a tiny one, to see that nothing breaks
before a GPU's time is spent on it; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 480.0  # seconds from the start after which no row begins; one that runs is given up 45 s later


def told(row: dict[str, Any], done: int, total: int) -> None:
    """One line a row, at once: what a machine says before it is taken away."""
    from imagen_kit.bench import table

    seconds = time.monotonic() - START
    print(f"{seconds:5.0f} s  {done}/{total}  {table.told(row)}", flush=True)


START = time.monotonic()


def stopped(*_: object) -> None:
    """Asked to end (SIGTERM): as by Ctrl-C the worker goes, and the file says what was not run."""
    sys.exit(128 + signal.SIGTERM)


def make_room(file: Path, about: dict[str, Any], protocol: Any) -> None:
    """Set results aside that cannot be gone on with: another machine's, or of other versions."""
    from imagen_kit.bench.store import Results
    from imagen_kit.errors import KitError

    if not file.exists():
        return
    try:
        Results(file, about, protocol)
    except KitError as error:
        aside = file.with_suffix(".before.json")
        file.replace(aside)
        print(f"begun anew, and the file kept as {aside.name}: {error}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite and print its table; 1 when no row of ours came through."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no row begins")
    parser.add_argument("--only", help="rows whose id contains this")
    parser.add_argument("--fresh", action="store_true", help="overwrite older results")
    parser.add_argument("--cpu-test", action="store_true", help="tiny sizes on the CPU")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))  # the checkout, wherever it was copied to
    try:
        import torch

        from imagen_kit.bench import engine, growth, store, suite, table
        from imagen_kit.bench.clock import Protocol
        from imagen_kit.errors import KitError
    except ModuleNotFoundError as error:
        print(f"error: {error}; nothing is downloaded: put it on PYTHONPATH", file=sys.stderr)
        return 2
    if not given.cpu_test and not torch.cuda.is_available():
        print("error: there is no CUDA device; --cpu-test tries the same on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.cpu_test else "cuda")
    try:
        chosen = suite.load("gpu", device, tiny=given.cpu_test)
        if given.only:
            chosen = chosen.only(given.only)
        protocol = Protocol(least=2, most=2, seconds=0.0) if given.cpu_test else chosen.protocol
        output = store.results_file(given.output)
        if not given.fresh:
            make_room(output, store.environment(device), protocol)
        plan = engine.Plan(
            chosen.cases,
            device,
            protocol,
            suite="gpu, tiny" if given.cpu_test else "gpu",
            budget=max(0.0, given.budget - (time.monotonic() - START)),
            one_process=True,
            tiny=given.cpu_test,
        )
        signal.signal(signal.SIGTERM, stopped)
        content = engine.run(plan, output, fresh=given.fresh, told=told)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.screen(content["rows"]))
    print(f"\n{table.environment(content)}\nceilings: {table.ceilings(content)}\n\n{growth.text(content)}")
    print(f"{content['seconds']:.0f} s; not run: {', '.join(content['not_run']) or 'none'}")
    return 0 if any(row["status"] == "ok" for row in content["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())

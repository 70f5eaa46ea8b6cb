"""What a sampling step costs besides the network: our tableaus, the formulas run eagerly, diffusers' schedulers.

    python benchmarks/samplers.py -o benchmarks/results/samplers-cpu.json [--device cuda]

The network is replaced by tensors that are there already, so what is timed is the sampler. All three are run in
turn, in one process, on the same shapes:

    1×4×8×8                       overhead: a step costs its launches
    8×3×256×256 and 4×16×128×128  bandwidth: a step costs the memory it passes over

``share`` is the time of plain copies that read and write as many bytes as the rows of the tableau (every slot
once, the state once), over the time of the run. Stochastic samplers are given their noise for this, so that the
share is that of the sums; all other times include drawing it. On a CPU a time is the CPU time of the one thread,
which other processes lengthen through the caches and the memory alone.

``waits`` counts, with a dispatch mode, how often a step makes the host wait for the device: the picture, the
network's answers and the time steps are followed as device tensors through every operation. Copies that a CPU
run does not make are not seen, so on a CPU the number for diffusers is a lower bound.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sampler_runs import LARGE, SMALL, Cell, Waits
from sampler_runs import peer as peer_of

from imagen_kit import samplers
from imagen_kit.bench.peers.schedulers import SCHEDULERS
from imagen_kit.samplers.graphs import graphed

WARM_UP = 2  # runs of each before the first that is counted
LEAST, MOST, STEADY = (
    7,
    40,
    0.05,
)  # repeats; fewer than MOST once the quartiles lie within STEADY of the median
TARGET_US, TARGET_SHARE = 10.0, 0.7


def clock(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, to the end of what it started: wall time on CUDA, the thread's own on a CPU."""
    if device.type != "cuda":
        start = time.thread_time()
        run()
        return time.thread_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def race(
    runs: dict[str, Callable[[], Any]],
    before: dict[str, Callable[[], None]],
    device: torch.device,
    inner: int,
) -> dict[str, dict[str, Any]]:
    """Median, quartiles and least seconds of every run, taken in turn so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for repeat in range(WARM_UP + MOST):
        for key, run in runs.items():
            total = 0.0
            for _ in range(inner):
                before.get(key, lambda: None)()
                total += clock(run, device)
            if repeat >= WARM_UP:
                seconds[key].append(total / inner)
        if repeat >= WARM_UP + LEAST and all(map(steady, seconds.values())):
            break
    return {
        key: {
            "median": statistics.median(values),
            "quartiles": statistics.quantiles(values, n=4)[::2],
            "least": min(values),
            "repeats": len(values),
            "steady": steady(values),
        }
        for key, values in seconds.items()
    }


def steady(values: list[float]) -> bool:
    """Whether half of the values lie close to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return high - low < 2 * STEADY * middle


def measure(name: str, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Everything about one sampler on one shape; times in seconds a run."""
    cell = Cell(name, shape, device)
    runs: dict[str, Callable[[], Any]] = {"tableau": cell.ours, "eager": cell.eager}
    before: dict[str, Callable[[], None]] = {}
    out: dict[str, Any] = {"steps": cell.steps, "nfe": cell.tableau.nfe, "noise_terms": cell.tableau.noises}
    if shape != SMALL:
        runs |= {"sums": cell.sums, "copy": cell.copies()}
        out["bytes"] = cell.bytes()
    if device.type == "cuda":
        replay = graphed(cell.answers(), cell.tableau, cell.x)
        runs["graph"] = lambda: replay(cell.x)
    peer = None
    if name in SCHEDULERS:
        try:
            peer = peer_of(cell)
            peer.prepare()
            peer.run()
        except Exception as error:  # an optional package it lacks, a prediction it does not have
            out["diffusers_failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            peer = None
    if peer is not None:
        runs["diffusers"], before["diffusers"] = peer.run, peer.prepare
        out["scheduler"] = SCHEDULERS[name][0]
    out["times"] = race(runs, before, device, inner=10 if shape == SMALL else 1)
    with Waits(cell.x, *cell.pool) as waits:
        cell.ours()
    out["waits_per_step"] = {"tableau": waits.count / cell.steps}
    if peer is not None:
        peer.prepare()
        with Waits(cell.x, *cell.pool, peer.scheduler.timesteps) as waits:
            peer.run()
        out["waits_per_step"]["diffusers"] = waits.count / cell.steps
    median = {key: entry["median"] for key, entry in out["times"].items()}
    out["us_per_step"] = {key: 1e6 * value / cell.steps for key, value in median.items()}
    out["least_us_per_step"] = {k: 1e6 * entry["least"] / cell.steps for k, entry in out["times"].items()}
    out["us_per_evaluation"] = 1e6 * median["tableau"] / cell.tableau.nfe
    if shape != SMALL:
        out["share"] = median["copy"] / median["sums"]
    return out


def conclusions(results: dict[str, dict[str, Any]]) -> list[str]:
    """What was reached, and what limits it, in sentences."""
    small = {name: cells["x".join(map(str, SMALL))] for name, cells in results.items()}
    cost = {name: cell["us_per_step"]["tableau"] for name, cell in small.items()}
    quiet = [cell["least_us_per_step"]["tableau"] for cell in small.values()]
    above = sorted((name for name in cost if cost[name] > TARGET_US), key=lambda name: cost[name])
    lines = [
        f"overhead at {'×'.join(map(str, SMALL))}: {len(cost) - len(above)} of {len(cost)} linear samplers take at "
        f"most {TARGET_US:g} µs a step (median {statistics.median(cost.values()):.1f}, "
        f"least {min(cost.values()):.1f}, most {max(cost.values()):.1f}); in their least disturbed repeat "
        f"{sum(value <= TARGET_US for value in quiet)} do (most {max(quiet):.1f})"
    ]
    if above:
        told = ", ".join(
            f"{name} {cost[name]:.1f} µs ({small[name]['us_per_evaluation']:.1f} an evaluation; evaluations a step: "
            f"{small[name]['nfe'] / small[name]['steps']:.3g}, noise terms: "
            f"{small[name]['noise_terms'] / small[name]['steps']:.3g})"
            for name in above
        )
        lines.append(
            f"above it: {told}; each evaluation costs one product, one copy of the answer and its views"
        )
    ratios = [
        cell["us_per_step"]["diffusers"] / cell["us_per_step"]["tableau"]
        for cell in small.values()
        if "diffusers" in cell["us_per_step"]
    ]
    if ratios:
        lines.append(
            f"diffusers takes {min(ratios):.1f} to {max(ratios):.0f} times as long a step "
            f"(median {statistics.median(ratios):.1f}, {len(ratios)} schedulers)"
        )
    for shape in LARGE:
        key = "x".join(map(str, shape))
        shares = {name: cells[key]["share"] for name, cells in results.items()}
        below = sorted(
            (name for name in shares if shares[name] < TARGET_SHARE), key=lambda name: shares[name]
        )
        least = min(shares, key=lambda name: shares[name])
        lines.append(
            f"bandwidth at {'×'.join(map(str, shape))}: {len(shares) - len(below)} of {len(shares)} reach "
            f"{TARGET_SHARE:.0%} of a plain copy of the same bytes (median "
            f"{statistics.median(shares.values()):.0%}, least {shares[least]:.0%}: {least})"
            + (f"; below: {', '.join(f'{name} {shares[name]:.0%}' for name in below)}" if below else "")
        )
    lines.append(
        "limits of the bandwidth: on a CPU torch has no kernel that sums three scaled tensors, so from the third "
        "term on a row passes over its state again (2 reads and 1 write a term in place of 1 read)"
    )
    ours = max(cell["waits_per_step"]["tableau"] for cells in results.values() for cell in cells.values())
    theirs = [
        cell["waits_per_step"]["diffusers"]
        for cell in small.values()
        if "diffusers" in cell["waits_per_step"]
    ]
    if theirs:
        lines.append(
            f"waits for the device a step: ours {ours:g}, diffusers {min(theirs):g} to {max(theirs):g}"
        )
    unsteady = [
        f"{name} {shape} {key}"
        for name, cells in results.items()
        for shape, cell in cells.items()
        for key, entry in cell["times"].items()
        if not entry["steady"]
    ]
    total = sum(len(cell["times"]) for cells in results.values() for cell in cells.values())
    lines.append(
        f"{total - len(unsteady)} of {total} timings are steady (quartiles within ±{STEADY:.0%} of the median); the "
        "others met other work on the machine"
    )
    return lines


def table(results: dict[str, dict[str, Any]]) -> str:
    """The medians, for the screen."""
    keys = ["x".join(map(str, shape)) for shape in (SMALL, *LARGE)]
    lines = [
        f"{'':<19}{'µs a step, ' + keys[0]:^34}  {'waits':^11}  {keys[1]:^26}  {keys[2]:^26}",
        f"{'sampler':<19}{'tableau':>8}{'eager':>9}{'diffusers':>10}{'ratio':>7}  {'ours':>5}{'theirs':>6}"
        + f"  {'ms':>8}{'diffusers':>11}{'share':>7}" * 2,
    ]
    for name, cells in results.items():
        first = cells[keys[0]]
        us, waits = first["us_per_step"], first["waits_per_step"]
        theirs = us.get("diffusers")
        line = f"{name:<19}{us['tableau']:>8.1f}{us['eager']:>9.1f}"
        line += f"{theirs:>10.1f}{theirs / us['tableau']:>7.1f}" if theirs else f"{'-':>10}{'-':>7}"
        line += f"  {waits['tableau']:>5.1f}{waits.get('diffusers', float('nan')):>6.1f}"
        for key in keys[1:]:
            us = cells[key]["us_per_step"]
            line += f"  {us['tableau'] / 1e3:>8.2f}"
            line += f"{us['diffusers'] / 1e3:>11.2f}" if "diffusers" in us else f"{'-':>11}"
            line += f"{cells[key]['share']:>7.0%}"
        lines.append(line)
    return "\n".join(lines)


def describe(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    names = ("torch", "diffusers", "numpy", "scipy", "triton", "imagen-kit")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = found[0].split(":", 1)[1].strip() if found else model
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "protocol": (
            f"{WARM_UP} warm-up runs, then {LEAST} to {MOST} repeats of all in turn, medians and quartiles; "
            + ("wall time" if device.type == "cuda" else "CPU time of the thread")
        ),
    }


def main() -> None:
    """Run the benchmark, print its table and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samplers", help="names, comma-separated; all linear ones by default")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    linear = [name for name in samplers.names() if samplers.describe(name)["linear"]]
    chosen = arguments.samplers.split(",") if arguments.samplers else linear
    about = describe(device)
    results: dict[str, dict[str, Any]] = {}
    gc.disable()
    with torch.no_grad():
        for name in chosen:
            gc.collect()
            results[name] = {}
            for shape in (SMALL, *LARGE):
                results[name]["x".join(map(str, shape))] = measure(name, shape, device)
            print(f"{name} done", file=sys.stderr)
    said = conclusions(results)
    print(table(results))
    print("\n".join(said))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({**about, "conclusions": said, "samplers": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

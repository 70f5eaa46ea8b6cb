"""What a comparison comes to: means over seeds, the Pareto front, and the cheapest setting that is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_kit.errors import KitError, unknown
from imagen_kit.evaluation.measures import value
from imagen_kit.evaluation.pocket import wilson

COSTS = {
    "nfe": "network evaluations (calls of the first stage's network)",
    "work": "network evaluations' worth of blocks computed (first stage)",
    "evaluations_per_picture": "network passes a picture, first stage",
    "seconds_per_picture": "seconds a picture",
    "memory": "peak memory",
}
"""Keys and labels of what is paid."""

Point = dict[str, Any]
ROUND = (1, 2, 5)  # times powers of ten: the targets that are chosen by themselves


def points(results: Mapping[str, Any]) -> list[Point]:
    """The cells with their seeds averaged, cheapest first within each sampler and guidance scale.

    A point has ``sampler``, ``steps``, ``guidance``, ``budget``, ``seeds`` (how many), the mean of every cost
    and quality by its key, ``saved``, the share of blocks that a step cache left out, and ``spread``: by quality
    (lowest, highest) over the seeds; for the accuracy the 95 % interval of all pictures together. Cells that failed
    are left out.
    """
    keys = [quality["key"] for quality in results["qualities"]]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        if "failed" not in cell:
            groups.setdefault((cell["sampler"], cell["guidance"], cell["steps"]), []).append(cell)
    out = []
    for (sampler, guidance, steps), cells in groups.items():
        point: Point = {"sampler": sampler, "guidance": guidance, "steps": steps, "seeds": len(cells)}
        point["budget"], point["spread"] = cells[0]["budget"], {}
        for key in (*COSTS, *keys):
            numbers = [n for n in (value(cell, key) for cell in cells) if n is not None]
            point[key] = sum(numbers) / len(numbers) if numbers else None
            if key in keys and numbers:
                point["spread"][key] = [min(numbers), max(numbers)]
        if point["work"] is not None and point["nfe"]:
            point["saved"] = 1 - point["work"] / point["nfe"]
        if point.get("accuracy") is not None:
            n = sum(cell["n"] for cell in cells)
            right = sum(round(cell["accuracy"]["all"] * cell["n"]) for cell in cells)
            point["spread"]["accuracy"] = list(wilson(right, n))
        out.append(point)
    order = list(results["samplers"])
    return sorted(out, key=lambda p: (order.index(p["sampler"]), p["guidance"] or -math.inf, p["nfe"]))


def pareto(points: Sequence[Point], cost: str, quality: str, better: str) -> list[Point]:
    """The points that no other one beats in cost without being worse in quality, cheapest first."""
    sign = 1 if better == "lower" else -1
    known = [p for p in points if p.get(cost) is not None and p.get(quality) is not None]
    front: list[Point] = []
    for point in sorted(known, key=lambda p: (p[cost], sign * p[quality])):
        if not front or sign * point[quality] < sign * front[-1][quality]:
            front.append(point)
    return front


def parse_targets(targets: Sequence[str], qualities: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """``["accuracy=0.5", "0.02"]`` → [("accuracy", 0.5), (the foremost quality, 0.02)].

    Raises:
        KitError: not a number, or no quality of this comparison.
    """
    keys = [quality["key"] for quality in qualities]
    out = []
    for text in targets:
        key, _, number = text.rpartition("=")
        key = key.strip().rstrip("<>") or keys[0]
        if key not in keys:
            raise KitError("--target: " + unknown("quality", key, keys))
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise KitError(f"--target must be a number or QUALITY=NUMBER, e.g. {keys[0]}=0.02, not {text!r}")
        out.append((key, bound))
    return out


def default_target(points: Sequence[Point], quality: Mapping[str, Any]) -> float | None:
    """A round number that at least half of the samplers reach: the strictest of 1, 2, 5 times a power of ten.

    None where nothing was measured, or where not even that says anything (values that are not positive).
    """
    sign = 1 if quality["better"] == "lower" else -1
    best: dict[str, float] = {}
    for point in points:
        found = point.get(quality["key"])
        if found is not None:
            best[point["sampler"]] = min(sign * found, best.get(point["sampler"], math.inf))
    if not best:
        return None
    reached = sign * sorted(best.values())[(len(best) - 1) // 2]
    if reached <= 0:
        return None
    power = math.floor(math.log10(reached))
    # Written in decimal, so that 5e-3 and not 0.005000000000000001 is compared and printed.
    series = [float(f"{m}e{p}") for p in (power, power + 1) for m in ROUND]
    return min(v for v in series if v >= reached) if sign > 0 else max(v for v in series if v <= reached)


def answers(results: Mapping[str, Any], targets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What is cheapest for every target, at every guidance scale.

    Without targets one is chosen for the foremost quality. An answer has ``quality``, ``target``,
    ``guidance``, the ``sampler`` and ``steps`` (None where nothing reaches the target), and ``text``.
    """
    every = points(results)
    qualities = {quality["key"]: quality for quality in results["qualities"]}
    wanted = parse_targets(targets, results["qualities"])
    scales = list(dict.fromkeys(point["guidance"] for point in every))
    if not wanted and qualities:
        first = next(iter(qualities.values()))
        chosen = default_target(every, first)
        wanted = [] if chosen is None else [(first["key"], chosen)]
    out = []
    for key, bound in wanted:
        for scale in scales:
            here = [point for point in every if point["guidance"] == scale]
            out.append(_answer(here, qualities[key], bound, scale, many=len(scales) > 1))
    return out


def _answer(
    every: Sequence[Point], quality: Mapping[str, Any], bound: float, guidance: float | None, many: bool
) -> dict[str, Any]:
    key, lower = quality["key"], quality["better"] == "lower"
    good = [p for p in every if p.get(key) is not None and (p[key] <= bound if lower else p[key] >= bound)]
    # Of equally many evaluations the better result, and not the faster: seconds differ from run to run.
    paid = foremost_cost(every)
    cheapest = sorted(good, key=lambda p: (p[paid], p[key] if lower else -p[key]))
    sign = "≤" if lower else "≥"
    start = f"For {quality['label']} {sign} {bound:g}" + (f" at {spoken(guidance)}" if many else "")
    answer = {"quality": key, "target": bound, "guidance": guidance, "sampler": None, "steps": None}
    if not cheapest:
        known = [p[key] for p in every if p.get(key) is not None]
        hint = f"; the best is {(min if lower else max)(known):.3g}" if known else ""
        return {**answer, "text": f"{start} nothing measured is good enough{hint}."}
    best = cheapest[0]
    text = (
        f"{start} the cheapest is {best['sampler']} with {_steps(best)}: {_paid(best)}, "
        f"{best['seconds_per_picture']:.2g} s a picture ({key} {best[key]:.3g})"
    )
    other = next((p for p in cheapest if p["sampler"] != best["sampler"]), None)
    if other is not None:
        text += f"; then {other['sampler']} with {_steps(other)}, {_paid(other)}"
    return {**answer, "sampler": best["sampler"], "steps": best["steps"], "text": text + "."}


def foremost_cost(points: Sequence[Mapping[str, Any]]) -> str:
    """``work`` where a step cache left some out (and it is known of all points), else ``nfe``."""
    known = all(point.get("work") is not None for point in points)
    return "work" if known and any(point["work"] != point["nfe"] for point in points) else "nfe"


def _paid(point: Point) -> str:
    """``20 evaluations``, with a cache ``20 evaluations with the work of 11.3``."""
    work = "" if point.get("work") in (None, point["nfe"]) else f" with the work of {point['work']:.3g}"
    return f"{point['nfe']:g} evaluation{'s' * (point['nfe'] != 1)}{work}"


def spoken(guidance: float | None) -> str:
    """``guidance 1.5``, or ``the recipe's guidance``."""
    return "the recipe's guidance" if guidance is None else f"guidance {guidance:g}"


def _steps(point: Point) -> str:
    return f"{point['steps']} step{'s' * (point['steps'] != 1)}"

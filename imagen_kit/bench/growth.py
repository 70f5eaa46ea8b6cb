"""How time and memory grow: exponents fitted to rows that differ in one number alone.

A quantity that grows like x^p is a straight line of slope p on logarithmic axes; p is fitted by least squares, and
r² says how straight the line is. Fixed costs (launches, weights being read) bend it at its lower end, so the slope
between the two largest sizes is told too: it is the one to go on from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.table import CONSTRUCTED, Sizes, aligned, plain, size_key, sizes

#: What is fitted: words → (entry) → number; memory without the weights, which do not grow.
QUANTITIES = {
    "time": lambda entry: entry["seconds"]["median"],
    "memory beyond weights": lambda entry: entry["activation_bytes"],
    "FLOPs": lambda entry: entry["flops"],
}
FEWEST = 3  # different sizes


@dataclass(frozen=True)
class Fit:
    """One curve.

    Attributes:
        kind, name: of the case.
        fixed: the options that all its rows share.
        axis: the option that varies.
        who: the entry.
        quantity: one of ``QUANTITIES``.
        points: (size, value), sizes ascending.
        exponent: slope of the least-squares line through the logarithms.
        r2: share of the variance of the logarithms that the line explains.
        last: slope between the two largest sizes.
    """

    kind: str
    name: str
    fixed: dict[str, Any]
    axis: str
    who: str
    quantity: str
    points: tuple[tuple[float, float], ...]
    exponent: float
    r2: float
    last: float


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(exponent, r², slope at the end) of points (x, y) with y ∝ x^exponent; x ascending, all positive.

    >>> fit([(1, 3.0), (2, 12.0), (4, 48.0)])
    (2.0, 1.0, 2.0)
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mx, my = (sum(pair[i] for pair in logs) / len(logs) for i in (0, 1))
    sxx = sum((x - mx) ** 2 for x, _ in logs)
    sxy = sum((x - mx) * (y - my) for x, y in logs)
    syy = sum((y - my) ** 2 for _, y in logs)
    slope = sxy / sxx
    # Of a quantity that does not grow there is nothing to explain.
    r2 = 1.0 if syy < 1e-24 else sxy**2 / (sxx * syy)
    (x0, y0), (x1, y1) = logs[-2:]
    return slope, r2, (y1 - y0) / (x1 - x0)


def fits(rows: Sequence[Row]) -> list[Fit]:
    """Every curve with at least ``FEWEST`` sizes."""
    found = []
    for axis, fixed, group in _lines(rows):
        for who in group[0]["entries"]:
            for quantity, read in QUANTITIES.items():
                points = sorted(_points(group, axis, who, read))
                if len(points) >= FEWEST:
                    kind, name = group[0]["kind"], group[0]["name"]
                    found.append(Fit(kind, name, fixed, axis, who, quantity, tuple(points), *fit(points)))
    return found


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Any], list[Row]]]:
    """(axis, shared options, rows) of all rows that differ in one number."""
    axes = dict.fromkeys(key for row in rows for key, v in row["options"].items() if _is_number(v))
    for axis in axes:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if _is_number(row["options"].get(axis)):
                rest = {key: value for key, value in row["options"].items() if key != axis}
                key = json.dumps([row["kind"], row["name"], rest], sort_keys=True)
                groups.setdefault(key, []).append(row)
        for key, group in groups.items():
            if len(group) >= FEWEST:
                yield axis, json.loads(key)[2], group


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _points(group: Sequence[Row], axis: str, who: str, read: Any) -> Iterator[tuple[float, float]]:
    for row in group:
        entry = row["entries"].get(who, {})
        if entry.get("status") == OK and read(entry):
            yield float(row["options"][axis]), float(read(entry))


def table(found: Sequence[Fit], named: Sizes | None = None) -> list[list[str]]:
    """Heading and cells; networks by what ``sizes`` names them, see ``imagen_kit.bench.table``."""
    head = ["what", "grows with", "who", "quantity", "sizes", "exponent", "r²", "at the end"]
    return [head, *(_cells(curve, named or {}) for curve in found)]


def _cells(curve: Fit, named: Sizes) -> list[str]:
    words = {key: named.get(size_key(curve.name, curve.fixed.get(key))) for key in CONSTRUCTED}
    told = ", ".join(
        words.get(key) or f"{key} {plain(value)}" for key, value in curve.fixed.items() if key != "peers"
    )
    sizes = f"{curve.points[0][0]:g}-{curve.points[-1][0]:g} ({len(curve.points)})"
    figures = [f"{curve.exponent:.2f}", f"{curve.r2:.3f}", f"{curve.last:.2f}"]
    what = f"{curve.kind} {curve.name}" + (f" {told}" if told else "")
    return [what, curve.axis, curve.who, curve.quantity, sizes, *figures]


def text(content: Mapping[str, Any]) -> str:
    """The fitted exponents of a results file, aligned."""
    found = fits(content["rows"])
    if not found:
        return f"no option takes {FEWEST} different sizes in these rows"
    return aligned(table(found, sizes(content["rows"])))

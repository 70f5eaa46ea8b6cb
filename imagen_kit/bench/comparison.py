"""Two results files beside each other: what became faster or slower beyond the spread, and what else differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.store import differing, read
from imagen_kit.bench.subject import OURS
from imagen_kit.bench.table import aligned, duration, number


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        id: the row's.
        before, after: median seconds.
        ratio: after over before; above 1 is slower.
        low, high: the ratio's spread: the quartiles of one over the opposite quartiles of the other.
        memory: peak after over before; None where unknown.
        floor: the peak over weights and what must be alive, before and after; None where that was not measured.
    """

    id: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    memory: float | None
    floor: tuple[float, float] | None = None

    @property
    def beyond(self) -> bool:
        """Whether the two spreads do not meet."""
        return self.low > 1 or self.high < 1


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Rows that both files measured, what changed most first."""
    old = {row["id"]: row for row in before["rows"]}
    pairs = [(old[row["id"]], row) for row in after["rows"] if row["id"] in old]
    found = [_change(a, b) for a, b in pairs if _done(a) and _done(b)]
    return sorted(found, key=lambda change: (not change.beyond, -abs(math.log(change.ratio))))


def _done(row: Row) -> bool:
    return row["entries"].get(OURS, {}).get("status") == OK


def _change(before: Row, after: Row) -> Change:
    a, b = (row["entries"][OURS] for row in (before, after))
    (a_low, a_high), (b_low, b_high) = a["seconds"]["quartiles"], b["seconds"]["quartiles"]
    first, second = a["seconds"]["median"], b["seconds"]["median"]
    peaks = a["peak_bytes"], b["peak_bytes"]
    memory = peaks[1] / peaks[0] if all(peaks) else None
    floors = [entry.get("floor") for entry in (a, b)]
    floor = (floors[0]["over_alive"], floors[1]["over_alive"]) if all(floors) else None
    return Change(after["id"], first, second, second / first, b_low / a_high, b_high / a_low, memory, floor)


def compare(first: Path, second: Path) -> str:
    """What differs between two results files, as text.

    Raises:
        KitError: a file that is not there or no results file.
    """
    before, after = read(first), read(second)
    return "\n".join([*_surroundings(before, after), "", *_figures(before, after)])


def _surroundings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs besides the figures."""
    found = [
        f"  {part} {key}: {_word(a)} -> {_word(b)}"
        for part in ("environment", "protocol")
        for key, (a, b) in differing(before[part], after[part]).items()
    ]
    return ["differences of the environment:", *found] if found else ["same environment and protocol"]


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    found = changes(before, after)
    moved = [change for change in found if change.beyond]
    told = any(change.floor for change in found)
    head = ["row", "before", "after", "after/before", "spread", "memory", *(["over floor"] * told), ""]
    table = [
        [
            change.id,
            duration(change.before),
            duration(change.after),
            f"{change.ratio:.2f}",
            f"{change.low:.2f}-{change.high:.2f}",
            "" if change.memory is None else f"{change.memory:.2f}",
            *([_floor(change)] * told),
            ("slower" if change.ratio > 1 else "faster") if change.beyond else "",
        ]
        for change in found
    ]
    out = [aligned([head, *table])] if found else []
    faster = sum(change.ratio < 1 for change in moved)
    out.append(
        f"{len(found)} rows in both: {faster} faster and {len(moved) - faster} slower beyond their spread, "
        f"{len(found) - len(moved)} within it"
        + (f"; ratio of all (geometric mean) {_mean(found)}" if found else "")
    )
    for row_id, (a, b) in _statuses(before, after).items():
        out.append(f"{row_id}: {a} -> {b}")
    return out


def _floor(change: Change) -> str:
    return "" if change.floor is None else f"{change.floor[0]:.2f} -> {change.floor[1]:.2f}"


def _mean(found: list[Change]) -> str:
    return number(math.exp(sum(math.log(change.ratio) for change in found) / len(found)))


def _statuses(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Rows that only one file has measured, or has at all."""
    both = [{row["id"]: row["status"] for row in content["rows"]} for content in (before, after)]
    every = list(dict.fromkeys([*both[0], *both[1]]))
    states = {key: (both[0].get(key, "not there"), both[1].get(key, "not there")) for key in every}
    return {key: pair for key, pair in states.items() if pair[0] != pair[1]}

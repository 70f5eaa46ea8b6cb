"""Rows with a measured floor as a table of their own: what was held at the peak, and how far above the least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.subject import OURS

COLUMNS = (
    "row", "weights MiB", "inputs MiB", "largest activation", "alive at once", "peak MiB", "process MiB",
    "peak/(weights + alive)", "peak/(weights + largest)", "time", "beside: peak (both ratios)",
)  # fmt: skip
MIB = 2**20


def told(rows: Sequence[Row]) -> bool:
    """Whether these rows are for this table: every one of ours that was measured has a floor."""
    done = [row["entries"][OURS] for row in rows if row["entries"].get(OURS, {}).get("status") == OK]
    return bool(done) and all(entry.get("floor") for entry in done)


def lines(row: Row, number: Callable[[float | None], str], duration: Callable[[float], str]) -> list[str]:
    """The cells of ``COLUMNS`` but the first.

    Args:
        row: one of ``told`` rows.
        number, duration: how figures and seconds are written.
    """
    ours = row["entries"].get(OURS, {})
    beside = ", ".join(_peer(who, entry, number) for who, entry in row["entries"].items() if who != OURS)
    if ours.get("status") != OK:
        return [row["status"], *[""] * (len(COLUMNS) - 3), beside or row["reason"][:60]]
    floor = ours["floor"]
    process = floor["process"]
    return [
        *(number(floor[key] / MIB) for key in ("weights", "inputs", "largest", "alive", "peak")),
        "" if process is None else number(process / MIB),
        f"{floor['over_alive']:.2f}",
        f"{floor['over_largest']:.2f}",
        duration(ours["seconds"]["median"]),
        beside,
    ]


def _peer(who: str, entry: Mapping[str, Any], number: Callable[[float | None], str]) -> str:
    """A peer: its peak, over its own two floors."""
    floor = entry.get("floor")
    if entry["status"] != OK or not floor:
        return f"{who}: {entry['status']}"
    return (
        f"{who}: {number(floor['peak'] / MIB)} MiB ({floor['over_alive']:.2f}, {floor['over_largest']:.2f})"
    )

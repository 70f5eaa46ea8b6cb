"""Results as tables: aligned for a screen, in Markdown for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.subject import OURS

COLUMNS = ("row", "time", "per second", "TFLOP/s", "% matmul", "% copy", "peak MiB", "waits/step", "beside")
UNITS = ("s", "ms", "µs", "ns")
MIB = 2**20
LONGEST = 48  # characters of an option's value within a row


def lines(row: Row) -> list[str]:
    """The cells of ``COLUMNS`` for one row; a peer is "name: its time over ours, difference of results"."""
    ours = row["entries"].get(OURS, {})
    if ours.get("status") != OK:
        beside = _beside(row) if row["entries"] else ""
        return [row["status"], *[""] * 6, beside or row["reason"][:60]]
    peak = ours["peak_bytes"]
    return [
        _time(ours["seconds"]),
        f"{number(ours['per_second'])} {ours['unit']}",
        number(ours["tflops"]),
        number(ours["percent_of_matmul"]),
        number(ours["percent_of_copy"]),
        "" if peak is None else number(peak / MIB),
        number(ours["waits_per_step"]),
        _beside(row),
    ]


def told(row: Row) -> str:
    """A row in one line, for a log."""
    cells = lines(row)
    return f"{row['kind']}/{label(row)}: " + ", ".join(cell for cell in (*cells[:2], cells[-1]) if cell)


def _time(seconds: Mapping[str, Any]) -> str:
    low, high = seconds["quartiles"]
    away = max(high - seconds["median"], seconds["median"] - low) / seconds["median"]
    return f"{duration(seconds['median'])} ±{away:.0%}"


def _beside(row: Row) -> str:
    found = []
    for who, entry in row["entries"].items():
        if who == OURS:
            continue
        if entry["status"] != OK:
            found.append(f"{who}: {entry['status']}")
            continue
        off = row["difference"].get(who)
        away = "" if off is None else f" (Δ {off['max_abs']:.0e})"
        times = f"{row['ratio'][who]:.2f}×" if who in row["ratio"] else duration(entry["seconds"]["median"])
        found.append(f"{who}: {times}{away}")
    return ", ".join(found)


def screen(rows: Sequence[Row]) -> str:
    """All rows under the headings of their kinds, aligned."""
    parts = []
    for kind, group in by_kind(rows).items():
        shared = _shared(group)
        table = [[label(row, shared), *lines(row)] for row in group]
        parts.append(f"{kind}{_all_with(shared, ': all with ')}\n{aligned([list(COLUMNS), *table])}")
    return "\n\n".join(parts)


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows in the order measured, under their kinds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["kind"], []).append(row)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Rows of one kind as a Markdown table; options that all rows share stand above it, what was chosen beside it."""
    shared = _shared(rows)
    head = ["| " + " | ".join((*COLUMNS, "chosen")) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    body = []
    for row in rows:
        note = row["entries"].get(OURS, {}).get("note", "")
        cells = [label(row, shared, mark="`"), *lines(row), note]
        body.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    above = [f"{_all_with(shared, 'All with ')}.", ""] if shared else []
    return "\n".join([*above, *head, *body])


def _shared(rows: Sequence[Row]) -> dict[str, Any]:
    if len(rows) < 2:
        return {}
    first = rows[0]["options"]
    return {k: v for k, v in first.items() if all(row["options"].get(k, ...) == v for row in rows)}


def _all_with(shared: Mapping[str, Any], words: str) -> str:
    return words + ", ".join(f"{key} {plain(value)}" for key, value in shared.items()) if shared else ""


def label(row: Row, shared: Mapping[str, Any] | None = None, mark: str = "") -> str:
    """A row's name and those of its options that are not shared, in words."""
    told = [
        f"{key} {_cut(plain(value))}"
        for key, value in row["options"].items()
        if key not in (shared or {}) and value is not None and key != "peers"
    ]
    return f"{mark}{row['name']}{mark}" + (f" {', '.join(told)}" if told else "")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def plain(value: Any) -> str:
    """An option's value in words: a map as its pairs."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {plain(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list | tuple):
        return "-".join(map(plain, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart: the first and last to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    last = len(widths) - 1
    out = []
    for cells in table:
        padded = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        out.append("  ".join(padded).rstrip())
    return "\n".join(out)


def duration(seconds: float) -> str:
    """``0.00321`` → ``3.21 ms``."""
    scaled, unit = seconds, UNITS[0]
    for unit in UNITS:
        if scaled >= 1:
            break
        if unit != UNITS[-1]:
            scaled *= 1000
    return f"{number(scaled)} {unit}"


def number(value: float | None) -> str:
    """Three digits: ``1234.5`` → ``1230``; "" for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        digits = len(str(round(abs(value)))) - 3
        return f"{round(value, -digits):.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 0.01 else f"{value:.1e}"


def environment(content: Mapping[str, Any]) -> str:
    """Where results come from, in one line."""
    about = content["environment"]
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in ("torch", "diffusers", "transformers", "k-diffusion", "imagen-pytorch", "torchao")
        if name in about["versions"]
    )
    where = about["device"] + (f", {about['threads']} thread(s)" if about["kind"] == "cpu" else "")
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    return f"{where}{driver}, Python {about['versions']['python']}, {versions}, {content['date'][:10]}"


def ceilings(content: Mapping[str, Any]) -> str:
    """The measured ceilings in one line."""
    found = content["ceilings"] or {}
    products = [
        f"{name} {number(top['flops'] / 1e12)} TFLOP/s" for name, top in found.get("matmul", {}).items()
    ]
    copied = [f"copy {number(found['copy']['bytes'] / 1e9)} GB/s"] if "copy" in found else []
    return ", ".join([*products, *copied]) or "not measured"

"""Results as tables: aligned for a screen, in Markdown for a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from imagen_kit.bench import headroom
from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.subject import OURS

COLUMNS = ("row", "time", "per second", "TFLOP/s", "% matmul", "% copy", "peak MiB", "waits/step", "beside")
UNITS = ("s", "ms", "µs", "ns")
MIB = 2**20
LONGEST = 48  # characters of an option's value within a row
CONSTRUCTED = ("network", "options")  # options of a case that hold those of a constructor
SCALES = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
Sizes = Mapping[str, str]


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
    parts, found = [], sizes(rows)
    for kind, group in by_kind(rows).items():
        shared, (columns, cells) = _shared(group), _form(group)
        table = [[label(row, shared, sizes=found), *cells(row)] for row in group]
        parts.append(f"{kind}{_all_with(shared, ': all with ')}\n{aligned([list(columns), *table])}")
    explained = "\n".join(legend(rows))
    return "\n\n".join([*parts, *([explained] if explained else [])])


def _form(group: Sequence[Row]) -> tuple[Sequence[str], Callable[[Row], list[str]]]:
    """Columns, and what makes a row's cells: those of memory beside the least, where that is what was measured."""
    if headroom.told(group):
        return headroom.COLUMNS, lambda row: headroom.lines(row, number, duration)
    return COLUMNS, lines


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows in the order measured, under their kinds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["kind"], []).append(row)
    return found


def markdown(rows: Sequence[Row], among: Sequence[Row] | None = None) -> str:
    """Rows of one kind as a Markdown table; options that all rows share stand above it, what was chosen beside it.

    Args:
        rows: of the table.
        among: all that ``legend`` explains; these by default.
    """
    shared, found = _shared(rows), sizes(rows if among is None else among)
    columns, cells_of = _form(rows)
    head = ["| " + " | ".join((*columns, "chosen")) + " |", "|" + "---|" * (len(columns) + 1)]
    body = []
    for row in rows:
        note = row["entries"].get(OURS, {}).get("note", "")
        cells = [label(row, shared, "`", found), *cells_of(row), note]
        body.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    above = [f"{_all_with(shared, 'All with ')}.", ""] if shared else []
    return "\n".join([*above, *head, *body])


def _shared(rows: Sequence[Row]) -> dict[str, Any]:
    if len(rows) < 2:
        return {}
    first = {k: v for k, v in rows[0]["options"].items() if k not in CONSTRUCTED}
    return {k: v for k, v in first.items() if all(row["options"].get(k, ...) == v for row in rows)}


def _all_with(shared: Mapping[str, Any], words: str) -> str:
    return words + ", ".join(f"{key} {plain(value)}" for key, value in shared.items()) if shared else ""


def label(
    row: Row, shared: Mapping[str, Any] | None = None, mark: str = "", sizes: Sizes | None = None
) -> str:
    """A row's name and those of its options that are not shared, in words; a constructor's by the size they make."""
    told = []
    for key, value in row["options"].items():
        if key in (shared or {}) or value is None or value == [] or key == "peers":
            continue
        size = (sizes or {}).get(size_key(row["name"], value)) if key in CONSTRUCTED else None
        told.append(size or _pair(key, value, cut=True))
    return f"{mark}{row['name']}{mark}" + (f" {', '.join(told)}" if told else "")


def sizes(rows: Iterable[Row]) -> dict[str, str]:
    """``size_key`` of networks → their parameters in words, different ones of a name in different words."""
    counted: dict[str, tuple[str, int]] = {}
    for row in rows:
        count = row["entries"].get(OURS, {}).get("parameters")
        for value in (row["options"].get(key) for key in CONSTRUCTED if count):
            if value:
                counted.setdefault(size_key(row["name"], value), (row["name"], count))
    found: dict[str, str] = {}
    taken: dict[tuple[str, str], int] = {}
    for key, (name, count) in counted.items():
        words = parameters(count)
        again = taken[name, words] = taken.get((name, words), 0) + 1
        found[key] = words if again == 1 else f"{words} (variant {again})"
    return found


def size_key(name: str, value: Any) -> str:
    """Under which ``sizes`` has a constructor's options."""
    return json.dumps([name, value], sort_keys=True)


def legend(rows: Iterable[Row], mark: str = "") -> list[str]:
    """What ``sizes`` stands for: a line for each network."""
    lines = []
    for key, words in sizes(rows).items():
        name, value = json.loads(key)
        lines.append(f"{mark}{name}{mark} {words}: {_plain_pairs(value)}")
    return lines


def parameters(count: int) -> str:
    """``5440000`` → ``5.44 M parameters``."""
    told = next((f"{number(count / scale)} {unit}" for scale, unit in SCALES if count >= scale), str(count))
    return f"{told} parameters"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def plain(value: Any) -> str:
    """An option's value in words: a map as its pairs."""
    if isinstance(value, Mapping):
        return f"({_plain_pairs(value)})"
    if isinstance(value, list | tuple):
        return "-".join(map(plain, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _plain_pairs(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())


def part(value: Any) -> str:
    """As ``plain``, but of a map with a name, and of each in a list, the name and the rest: ``cfg (scale 2)``."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return " + ".join(map(part, value))
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        rest = {key: inner for key, inner in value.items() if key != "name"}
        return value["name"] + (f" ({pairs(rest)})" if rest else "")
    return f"({pairs(value)})" if isinstance(value, Mapping) else plain(value)


def pairs(value: Mapping[str, Any]) -> str:
    """A map's keys and values in words, parts as in ``part``."""
    return ", ".join(_pair(key, inner) for key, inner in value.items())


def _pair(key: str, value: Any, cut: bool = False) -> str:
    if key == "set" and isinstance(value, list | tuple):
        return "set " + " ".join(str(change).removeprefix("stages.0.") for change in value)
    return f"{key} {_cut(part(value)) if cut else part(value)}"


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

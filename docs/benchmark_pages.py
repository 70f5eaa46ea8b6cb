"""Text made of benchmark results, for README.md and benchmarks/README.md; see update_readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_kit.bench import growth, projection, roofline, store, table
from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.subject import OURS
from imagen_kit.bench.subjects.gain import OTHERS, WITHOUT

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
#: Results file → (what it is of, the command that makes it).
RUNS = {
    "cpu.json": ("A CPU", "imagen-kit bench --suite cpu -o benchmarks/results/cpu.json"),
    "gpu.json": ("A GPU", "python benchmarks/gpu.py -o benchmarks/results/gpu.json"),
}
KINDS = {
    "recipe": "Whole recipes",
    "gain": "Options, with and without",
    "denoiser": "Denoisers, one evaluation",
    "training": "Training steps",
    "text_encoder": "Text encoders",
    "codec": "Codecs",
    "sampler": "Samplers, without a network",
    "memory": "Memory",
    "startup": "Start-up",
}
PEERS = ("diffusers", "diffusers compiled")
TELLING = {
    "denoiser": 2,
    "training": 2,
    "text_encoder": 1,
    "codec": 1,
}  # rows of a kind, each of another name
GAINS = ("option", "recipe", "time without → with", "gain", "operations", "peak MiB", "largest difference")
NOT_MEASURED = "not measured"


def results() -> dict[str, dict[str, Any]]:
    """The results files that are there, by name."""
    return {name: store.read(RESULTS / name) for name in RUNS if (RESULTS / name).is_file()}


def throughput() -> str:
    """For README.md: whole recipes, the fastest networks, and how all rows stand beside diffusers."""
    found = results()
    parts = [_telling(name, content) for name, content in found.items()]
    missing = [f"Not measured yet: `{RUNS[name][1]}`" for name in RUNS if name not in found]
    return "\n\n".join([*parts, *missing])


def _telling(name: str, content: Mapping[str, Any]) -> str:
    done = [row for row in content["rows"] if row["status"] == OK]
    sizes = table.sizes(done)
    chosen = _recipes(row for row in done if row["kind"] == "recipe")
    for kind, count in TELLING.items():
        group = [row for row in done if row["kind"] == kind and row["entries"][OURS]["percent_of_matmul"]]
        best: dict[str, Row] = {}
        for row in sorted(group, key=lambda row: -row["entries"][OURS]["percent_of_matmul"]):
            best.setdefault(row["name"], row)
        chosen += list(best.values())[:count]
    columns = ("what", "time", "per second", "% of the matmul ceiling", "beside, difference of results")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in chosen:
        cells = table.lines(row)
        what = f"{row['kind']} {table.label(row, mark='`', sizes=sizes)}"
        lines.append("| " + " | ".join([what, cells[0], cells[1], cells[3], cells[-1]]) + " |")
    return "\n".join([*beside(done), "", *lines, "", _source(name, content)])


def _recipes(rows: Iterable[Row]) -> list[Row]:
    """Of each recipe and batch the fastest, at the recipe's own number of steps where that was measured."""
    whole: dict[str, list[Row]] = {}
    for row in rows:
        whole.setdefault(row["name"], []).append(row)
    chosen = []
    for group in whole.values():
        own = [row for row in group if row["options"].get("steps") is None]
        fastest: dict[int, Row] = {}
        for row in own or group:
            batch = row["options"].get("batch", 1)
            fastest[batch] = max(fastest.get(batch, row), row, key=_speed)
        chosen += list(fastest.values())
    return chosen


def _speed(row: Row) -> float:
    return row["entries"][OURS]["per_second"]


def beside(rows: Sequence[Row]) -> list[str]:
    """One sentence for each kind and peer: how many rows, in how many we are not slower, least and median."""
    said = []
    for kind, group in table.by_kind(rows).items():
        for peer in PEERS if kind != "gain" else ():  # those are with something that others have not
            ratios = [row["ratio"][peer] for row in group if peer in row["ratio"]]
            if not ratios:
                continue
            differences = [row["difference"][peer]["relative"] for row in group if peer in row["difference"]]
            off = f", largest difference {max(differences):.0e} of the rms" if differences else ""
            faster = sum(ratio >= 1 for ratio in ratios)
            said.append(
                f"- {KINDS.get(kind, kind)}: {peer} takes {statistics.median(ratios):.2f}× our time (median of "
                f"{len(ratios)} rows, {min(ratios):.2f}× to {max(ratios):.2f}×; not slower in {faster}){off}"
            )
    return said


def _source(name: str, content: Mapping[str, Any]) -> str:
    return f"`{RUNS[name][1]}` · {table.environment(content)}"


def gains() -> str:
    """What each option gains: a line for each row of a CPU, beside it those of a GPU with the same option."""
    found = results()
    rows = {name: _gains(found[name]["rows"]) if name in found else [] for name in RUNS}
    cpu, gpu = (rows[name] for name in RUNS)
    if not (cpu or gpu):
        return "\n".join(f"Not measured yet: `{command} --only gain/`" for _, command in RUNS.values())
    columns = (*GAINS, "diffusers takes", "on a GPU")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    shown = set()
    for option, row in cpu:
        first = option not in shown
        shown.add(option)
        there = [_in_short(other) for o, other in gpu if o == option] if first else ["see above"]
        lines.append("| " + " | ".join([option, *_gain(row), "; ".join(there) or NOT_MEASURED]) + " |")
    for option in dict.fromkeys(option for option, _ in gpu if option not in shown):
        there = "; ".join(_in_short(row) for o, row in gpu if o == option)
        lines.append("| " + " | ".join([option, NOT_MEASURED, *[""] * len(GAINS[2:]), "", there]) + " |")
    sources = [_source(name, found[name]) for name in RUNS if rows[name]]
    return "\n".join([*lines, "", *sources])


def _gains(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """(option in words, row) of those that try one, and those of an option together."""
    tried = [(table.pairs(row["options"]["option"]), row) for row in rows if row["kind"] == "gain"]
    order = list(dict.fromkeys(option for option, _ in tried))
    return sorted(tried, key=lambda pair: order.index(pair[0]))


def _gain(row: Row) -> list[str]:
    """The cells of a row from ``recipe`` to ``diffusers takes``."""
    recipe = table.label(row, {"option": None}, mark="`")
    ours, other = (row["entries"].get(who, {}) for who in (OURS, WITHOUT))
    if row["status"] != OK or other.get("status") != OK:
        return [recipe, f"{row['status']}: {row['reason'] or other.get('reason', '')}", *[""] * 5]
    before, after = (table.duration(entry["seconds"]["median"]) for entry in (other, ours))
    work = _pair(other, ours, "flops", 1e9, "GFLOP")
    peak = _pair(other, ours, "peak_bytes", table.MIB, "")
    there = f"{row['ratio'][PEERS[0]]:.2f}×" if PEERS[0] in row["ratio"] else ""
    return [recipe, f"{before} → {after}", f"{row['ratio'][WITHOUT]:.2f}×", work, peak, _apart(row), there]


def _pair(other: Mapping[str, Any], ours: Mapping[str, Any], key: str, scale: float, unit: str) -> str:
    """A quantity without and with the option; one number where they agree to a hundredth."""
    values = [entry.get(key) for entry in (other, ours)]
    if not all(values):
        return ""
    words = [table.number(value / scale) for value in values]
    same = abs(values[0] - values[1]) <= 0.01 * values[0]
    return f"{words[1] if same else ' → '.join(words)} {unit}".strip()


def _apart(row: Row) -> str:
    """The largest difference of a picture's number, and whether it is meant."""
    off = row["difference"].get(WITHOUT)
    meant = ", by design" if off and any(key in OTHERS for key in row["options"]["option"]) else ""
    return (f"{off['max_abs']:.0e}" if off else "") + meant


def _in_short(row: Row) -> str:
    """A row in one cell."""
    recipe, times, gain, _, peak, apart, there = _gain(row)
    told = [times, *([gain] if gain else [])]
    told += [f"peak {peak} MiB"] if peak else []
    told += [f"Δ {apart}"] if apart else []
    told += [f"diffusers {there}"] if there else []
    return f"{recipe}: {', '.join(told)}"


def surroundings() -> str:
    """For benchmarks/README.md: machines, versions, ceilings, commands."""
    parts = []
    for name, (title, command) in RUNS.items():
        content = results().get(name)
        if content is None:
            parts.append(f"- **{title}**: not measured yet; `{command}`")
            continue
        states = [row["status"] for row in content["rows"]]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        parts.append(
            f"- **{title}**: `{command}`\n  {table.environment(content)}\n"
            f"  Ceilings: {table.ceilings(content)}. Rows: {counted}; {content['seconds'] / 60:.0f} minutes."
        )
    return "\n".join(parts)


def tables() -> str:
    """Every row, by machine and kind, and what their networks are."""
    parts = []
    for name, content in results().items():
        if told := table.legend(content["rows"], "`"):
            lines = "\n".join(f"- {line}" for line in told)
            parts.append(f"### Networks of the rows: {content['environment']['device']}\n\n{lines}")
        for kind, rows in table.by_kind(content["rows"]).items():
            parts.append(
                f"### {KINDS.get(kind, kind)}: {content['environment']['device']}\n\n"
                + table.markdown(rows, content["rows"])
            )
        lost = [row for row in content["rows"] if row["status"] != OK]
        if lost:
            told = "\n".join(f"- `{row['id']}`: {row['status']}, {row['reason']}" for row in lost)
            parts.append(f"### Rows without figures: {content['environment']['device']}\n\n{told}")
        parts.append(_source(name, content))
    return "\n\n".join(parts) or "Nothing was measured yet."


def curves() -> str:
    """Fitted exponents."""
    parts = []
    for content in results().values():
        cells = growth.table(growth.fits(content["rows"]), table.sizes(content["rows"]))
        if len(cells) > 1:
            rows = ["| " + " | ".join(line) + " |" for line in cells]
            parts.append(
                "\n".join(
                    [content["environment"]["device"], "", rows[0], "|" + "---|" * len(cells[0]), *rows[1:]]
                )
            )
    return "\n\n".join(parts) or "Nothing was measured yet."


def paper() -> str:
    """What a cascade of the paper's size would take."""
    return projection.text(results().get("gpu.json"))


def pictures() -> str:
    """Draws the rooflines and answers with the lines that show them."""
    lines = []
    for name, content in results().items():
        file = RESULTS / f"roofline-{Path(name).stem}.png"
        roofline.draw(content, file)
        lines.append(
            f"![Every row against the ceilings of {content['environment']['device']}](results/{file.name})"
        )
    return "\n\n".join(lines) or "Nothing was measured yet."

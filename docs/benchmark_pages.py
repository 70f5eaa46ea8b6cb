"""Text made of benchmark results, for README.md and benchmarks/README.md; see update_readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_kit.bench import growth, projection, roofline, store, table
from imagen_kit.bench.measure import OK, Row
from imagen_kit.bench.subject import OURS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
#: Results file → (what it is of, the command that makes it).
RUNS = {
    "cpu.json": ("A CPU", "imagen-kit bench --suite cpu -o benchmarks/results/cpu.json"),
    "gpu.json": ("A GPU", "python benchmarks/gpu.py -o benchmarks/results/gpu.json"),
}
KINDS = {
    "recipe": "Whole recipes",
    "denoiser": "Denoisers, one evaluation",
    "training": "Training steps",
    "text_encoder": "Text encoders",
    "codec": "Codecs",
    "sampler": "Samplers, without a network",
    "memory": "Memory",
    "startup": "Start-up",
}
PEERS = ("diffusers", "diffusers compiled")


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
    fastest: dict[str, Row] = {}  # of each recipe
    for row in (row for row in done if row["kind"] == "recipe"):
        fastest[row["name"]] = max(fastest.get(row["name"], row), row, key=_speed)
    chosen = list(fastest.values())
    for kind in ("denoiser", "training"):
        group = [row for row in done if row["kind"] == kind and row["entries"][OURS]["percent_of_matmul"]]
        chosen += sorted(group, key=lambda row: -row["entries"][OURS]["percent_of_matmul"])[:2]
    columns = ("what", "time", "per second", "% of the matmul ceiling", "beside, difference of results")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in chosen:
        cells = table.lines(row)
        what = f"{row['kind']} {table.label(row, mark='`')}"
        lines.append("| " + " | ".join([what, cells[0], cells[1], cells[3], cells[-1]]) + " |")
    return "\n".join([*beside(done), "", *lines, "", _source(name, content)])


def _speed(row: Row) -> float:
    return row["entries"][OURS]["per_second"]


def beside(rows: Sequence[Row]) -> list[str]:
    """One sentence for each kind and peer: how many rows, in how many we are not slower, least and median."""
    said = []
    for kind, group in table.by_kind(rows).items():
        for peer in PEERS:
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
    """Every row, by machine and kind."""
    parts = []
    for name, content in results().items():
        for kind, rows in table.by_kind(content["rows"]).items():
            parts.append(
                f"### {KINDS.get(kind, kind)}: {content['environment']['device']}\n\n{table.markdown(rows)}"
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
        cells = growth.table(growth.fits(content["rows"]))
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

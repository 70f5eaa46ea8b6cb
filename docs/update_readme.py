"""Bring README.md and benchmarks/README.md up to date with registries and results: python docs/update_readme.py"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import benchmark_pages

from imagen_kit.cli import main
from imagen_kit.evaluation import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def listing() -> str:
    """What ``imagen-kit list`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["list"])
    return printed.getvalue().rstrip()


def accuracy() -> str:
    """The table of ``imagen-kit evaluate pocket-imagen``."""
    found = json.loads((RESULTS / "pocket-accuracy.json").read_text(encoding="utf-8"))
    lines = [
        "| captions | all right | one object | two objects | colour | shape | size | relation |",
        "|" + "---|" * 8,
    ]
    for language, name in (("en", "English"), ("zh", "Chinese")):
        row = found["languages"][language]
        low, high = row["interval"]
        shares = [row["one_object"]["all"], row["two_objects"]["all"]]
        shares += [row["accuracy"][key] for key in ("color", "shape", "size", "relation")]
        cells = [
            f"{row['accuracy']['all']:.1%} ({low:.0%}-{high:.0%}, n = {row['n']})",
            *(f"{s:.1%}" for s in shares),
        ]
        lines.append(f"| {name}, held out | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{found['provenance']['command']}` · {_machine(found)}"])


def comparison() -> str:
    """The table of ``imagen-kit compare pocket-imagen``, seeds averaged, and what it comes to."""
    found = json.loads((RESULTS / "pocket-compare" / "results.json").read_text(encoding="utf-8"))
    every = summary.points(found)
    guided = len({point["guidance"] for point in every}) > 1
    titles = ["sampler", "steps", *(["guidance"] if guided else []), "evaluations", "all right"]
    titles += ["RMSE to converged, 32 px", "seconds a picture"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for point in every:
        scale = "recipe's" if point["guidance"] is None else f"{point['guidance']:g}"
        row = [point["sampler"], point["steps"], *([scale] if guided else []), f"{point['nfe']:g}"]
        row += [f"{point['accuracy']:.0%}", f"{point['rmse']:.4f}", f"{point['seconds_per_picture']:.2f}"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    said = [answer["text"] for answer in found["answers"]]
    return "\n".join([*lines, "", *said, "", f"`{found['provenance']['command']}` · {_machine(found)}"])


def cost() -> str:
    """What ``benchmarks/samplers.py`` concludes."""
    found = json.loads((RESULTS / "samplers-cpu.json").read_text(encoding="utf-8"))
    lines = [f"- {line}" for line in found["conclusions"]]
    versions = f"torch {found['versions']['torch']}, diffusers {found['versions']['diffusers']}"
    machine = f"{found['device']} CPU, {found['threads']} thread(s), {versions}, {found['date'][:10]}"
    return "\n".join([*lines, "", f"`{found['command']}` · {machine}"])


def _machine(found: dict[str, Any]) -> str:
    facts = found["provenance"]
    return f"{facts['device']}, {facts['threads']} thread(s), torch {facts['versions']['torch']}, {facts['date'][:10]}"


def write(file: Path, contents: Mapping[str, str]) -> None:
    """Put each text between the marks of its name."""
    text = file.read_text(encoding="utf-8")
    for mark, content in contents.items():
        pattern = rf"(<!-- {mark}: .*? -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, new=content: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
    file.write_text(text, encoding="utf-8")


def run() -> None:
    """Write both pages."""
    write(
        ROOT / "README.md",
        {
            "list": f"```text\n{listing()}\n```",
            "accuracy": accuracy(),
            "comparison": comparison(),
            "cost": cost(),
            "throughput": benchmark_pages.throughput(),
            "gains": benchmark_pages.gains(),
        },
    )
    write(
        ROOT / "benchmarks" / "README.md",
        {
            "surroundings": benchmark_pages.surroundings(),
            "gains": benchmark_pages.gains(),
            "tables": benchmark_pages.tables(),
            "curves": benchmark_pages.curves(),
            "paper": benchmark_pages.paper(),
            "pictures": benchmark_pages.pictures(),
        },
    )


if __name__ == "__main__":
    run()

"""The picture of a comparison, for a paper: quality against network evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_kit.evaluation import summary
from imagen_kit.evaluation.measures import value
from imagen_kit.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*Xph<>"
# Okabe & Ito's colours, which people with any colour vision can tell apart; the yellow is darkened for white paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#6B6B00", "#444444")
WIDTH, HEIGHT = 7.2, 3.0  # inches: two columns of a paper
SMALLEST = 1e-12  # shown on a logarithmic axis in place of 0


def tradeoff(results: dict[str, Any], path: Path) -> None:
    """Write ``figure(results)`` as a PNG, whole or not at all."""
    drawn = figure(results)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=220)


def figure(results: dict[str, Any]) -> Figure:
    """The foremost quality, and where there is one the best that is no distance to it, side by side.

    Lines are means over seeds and guidance scales, bands their whole spread (bars: the 95 % interval of the
    accuracy); stochastic samplers are dotted; ringed points are the Pareto front.

    Args:
        results: content of ``results.json``, see ``compare.run``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _panels(results)
    points = summary.points(results)
    samplers = list(dict.fromkeys(point["sampler"] for point in points))
    columns = _columns([*samplers, "Pareto front"])
    rows = -(-(len(samplers) + 1) // columns)
    # A Figure of its own and not pyplot: no global state, no display, and nothing to close.
    out = Figure(figsize=(WIDTH, HEIGHT + 0.17 * rows), layout="constrained")
    FigureCanvasAgg(out)
    panels = out.subplots(1, len(shown), squeeze=False)[0]
    for axes, quality in zip(panels, shown, strict=True):
        _panel(axes, quality, points, results)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        out.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    out.suptitle(_title(results), fontsize=8)
    return out


def _panels(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The foremost quality, and a second that is measured without the converged result (or the next)."""
    measured = [q for q in results["qualities"] if any(q["key"] in cell for cell in results["cells"])]
    if not measured:
        return list(results["qualities"][:1])
    first, *others = measured
    own = [quality for quality in others if not quality["paired"]]
    return [first, *(own or others)[:1]]


def _panel(axes: Axes, quality: Mapping[str, Any], points: list[summary.Point], results: Any) -> None:
    key, log = quality["key"], quality["log"]
    lines = _lines(points, key)
    for i, (sampler, line) in enumerate(lines.items()):
        stochastic = results["samplers"].get(sampler, {}).get("stochastic", False)
        color = COLORS[i % len(COLORS)]
        nfe, middle, low, high = (
            [max(p[j], SMALLEST) if log and j else p[j] for p in line] for j in range(4)
        )
        if key == "accuracy":  # intervals of all samplers overlap, and as bands they would hide each other
            away = [[abs(m - end) for m, end in zip(middle, ends, strict=True)] for ends in (low, high)]
            axes.errorbar(nfe, middle, away, fmt="none", ecolor=color, elinewidth=0.5, capsize=1.5)
        else:
            axes.fill_between(nfe, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            nfe,
            middle,
            label=sampler,
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linestyle=":" if stochastic else "-",
            linewidth=1.1,
            markersize=3.5,
        )
    flat = [{"nfe": p[0], "y": p[1]} for line in lines.values() for p in line]
    front = summary.pareto(flat, "nfe", "y", quality["better"])
    axes.plot(
        [p["nfe"] for p in front],
        [max(p["y"], SMALLEST) if log else p["y"] for p in front],
        linestyle="none",
        marker="o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=0.7,
        label="Pareto front",
    )
    converged = [value(row, key) for row in results["references"]]
    known = [number for number in converged if number is not None]
    if known and not quality["paired"]:
        axes.axhline(sum(known) / len(known), color="0.4", linewidth=0.7, linestyle="--", zorder=0)
    worth = "' worth of work" if summary.foremost_cost(points) == "work" else ""
    _axes(axes, quality, [p["nfe"] for p in flat], f"network evaluations{worth}")


def _axes(axes: Axes, quality: Mapping[str, Any], counts: list[float], paid: str) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    if quality["log"]:
        axes.set_yscale("log")
    if quality["key"] == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(counts)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.tick_params(which="minor", labelsize=6)
    axes.set_xlabel(paid, fontsize=8)
    axes.set_ylabel(_folded(quality["label"]), fontsize=8)
    axes.grid(visible=True, which="major", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(points: list[summary.Point], key: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """(evaluations, mean, lowest, highest) of each sampler, cheapest first, over guidance scales and seeds."""
    found: dict[str, dict[int, list[summary.Point]]] = {}
    paid = summary.foremost_cost(points)
    for point in points:
        steps = found.setdefault(point["sampler"], {})
        if point.get(key) is not None:
            steps.setdefault(point["steps"], []).append(point)
    lines = {}
    for sampler, steps in found.items():
        line = []
        for group in steps.values():
            spread = [point["spread"][key] for point in group]
            nfe, mean = (sum(point[k] for point in group) / len(group) for k in (paid, key))
            line.append((nfe, mean, min(low for low, _ in spread), max(high for _, high in spread)))
        lines[sampler] = sorted(line)
    return lines


def _title(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    cells = results["cells"]
    what = f"{settings['n']} {settings.get('split', '')}".strip()
    words = f"captions ({settings['language']})" if "language" in settings else "samples"
    scales = list(dict.fromkeys(cell["guidance"] for cell in cells))
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    parts = [f"{settings['subject']}: {what} {words}", f"converged: {settings['reference']}"]
    if scales != [None]:
        parts.append("guidance " + ", ".join("own" if s is None else f"{s:g}" for s in scales))
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds")
    return "; ".join([*parts, "dotted: stochastic"])


def _columns(labels: Sequence[str]) -> int:
    """As many columns of a legend as its longest label leaves room for, four at most."""
    longest = max(len(label) for label in labels)
    return max(1, min(4, len(labels), int(WIDTH / (0.055 * longest + 0.55))))


def _folded(label: str, width: int = 34) -> str:
    """On two lines where it is long."""
    if len(label) <= width or " (" not in label:
        return label
    head, tail = label.rsplit(" (", 1)
    return f"{head}\n({tail}"


def _apart(counts: list[float], factor: float = 1.25) -> list[float]:
    """The counts whose labels do not run into each other on a logarithmic axis; of two near ones the larger."""
    kept: list[float] = []
    for count in sorted(set(counts), reverse=True):
        if not kept or count * factor < kept[-1]:
            kept.append(count)
    return kept[::-1]

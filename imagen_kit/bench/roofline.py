"""Every row against the ceilings: attainable FLOP/s at an arithmetic intensity (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_kit.bench.measure import OK
from imagen_kit.bench.subject import OURS
from imagen_kit.bench.table import number
from imagen_kit.errors import KitError
from imagen_kit.evaluation.plot import COLORS, MARKERS
from imagen_kit.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7.2, 5.2  # inches
LABELLED = 14  # rows: those that come nearest to their roof and farthest from it, and none atop another


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write ``figure(content)`` as a PNG (or what the suffix says), whole or not at all."""
    drawn = figure(content)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=200)


def figure(content: Mapping[str, Any]) -> Figure:
    """The kit's rows as points, peers' as rings of the same colour, the measured ceilings as lines.

    The intensity is FLOPs over the traffic of unfused operations; what fuses or stays in caches therefore can lie
    above the slanted line.

    Args:
        content: of a results file.

    Raises:
        KitError: no ceilings, or no row whose FLOPs and bytes are known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, about = [point for row in content["rows"] for point in _points(row)], content["environment"]
    top = content["ceilings"] or {}
    if not found or not top.get("matmul") or "copy" not in top:
        raise KitError("there is nothing to draw: no ceilings, or no row with counted FLOPs and bytes")
    out = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    tops, speed = _used(found, top), top["copy"]["bytes"]
    intensities = [*(point["intensity"] for point in found), *(flops / speed for flops in tops.values())]
    low, high = min(intensities) / 3, max(intensities) * 5
    _roofs(axes, tops, speed, low, high)
    kinds = list(dict.fromkeys(point["kind"] for point in found))
    for i, kind in enumerate(kinds):
        for ours in (True, False):
            group = [p for p in found if p["kind"] == kind and (p["who"] == OURS) is ours]
            axes.plot(
                [p["intensity"] for p in group],
                [p["rate"] for p in group],
                linestyle="none",
                marker=MARKERS[i % len(MARKERS)],
                markersize=5 if ours else 6,
                color=COLORS[i % len(COLORS)],
                markerfacecolor=COLORS[i % len(COLORS)] if ours else "none",
                label=f"{kind}" if ours else None,
                zorder=3,
            )
    _names(axes, [point for point in found if point["who"] == OURS])
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOPs a byte that unfused operations move", fontsize=8)
    axes.set_ylabel("FLOP/s reached", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, which="major", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([], [], "o", markersize=6, color="0.4", markerfacecolor="none", label="rings: peers, same work")
    out.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7, frameon=False
    )
    out.suptitle(f"{about['device']}, torch {about['versions']['torch']}, {content['date'][:10]}", fontsize=8)
    return out


def _points(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a row that can be drawn."""
    found = []
    for who, entry in row["entries"].items():
        if entry["status"] == OK and entry["flops"] and entry["bytes"]:
            rate = entry["flops"] / entry["seconds"]["median"]
            about = {"intensity": entry["flops"] / entry["bytes"], "rate": rate, "row": row}
            found.append({**about, "who": who, "kind": row["kind"], "precision": entry["precision"]})
    return found


def _used(found: list[dict[str, Any]], top: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s of the ceilings of the precisions that the rows are computed in; of all where none of them has one."""
    every = {name: product["flops"] for name, product in top["matmul"].items()}
    used = {point["precision"] for point in found}
    return {name: flops for name, flops in every.items() if name in used} or every


def _roofs(axes: Axes, tops: Mapping[str, float], speed: float, low: float, high: float) -> None:
    """The bandwidth as the slanted line, each precision's products as a level one from there on."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    best = max(tops.values())
    axes.plot([low, best / speed], [low * speed, best], color="0.2", linewidth=1.2)
    middle = (low * best / speed) ** 0.5
    about: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": "0.2"}
    place = (middle, middle * speed)
    axes.annotate(f"copy {number(speed / 1e9)} GB/s", place, xytext=(-6, 3), ha="right", **about)
    for name, flops in tops.items():
        axes.plot([flops / speed, high], [flops, flops], color="0.2", linewidth=0.9, linestyle="--")
        words = f"{name} {number(flops / 1e12)} TFLOP/s"
        axes.annotate(words, (high, flops), xytext=(-2, 2), ha="right", **about)


def _names(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Names beside the points that can be told apart, the fastest first."""
    from math import hypot, log10

    kept: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: -p["rate"]):
        place = (log10(point["intensity"]), log10(point["rate"]))
        if len(kept) < LABELLED and all(hypot(place[0] - x, 2 * (place[1] - y)) > 0.35 for x, y in kept):
            kept.append(place)
            axes.annotate(
                _short(point["row"]),
                (point["intensity"], point["rate"]),
                xytext=(5, -2.5),
                textcoords="offset points",
                fontsize=6,
                bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.5},
            )


def _short(row: Mapping[str, Any]) -> str:
    options = row["options"]
    told = [str(options[key]) for key in ("dtype", "mode") if key in options]
    batch = [f"×{options['batch']}"] if "batch" in options else []
    return " ".join([row["name"], *batch, *told])

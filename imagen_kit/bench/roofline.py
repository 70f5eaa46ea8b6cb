"""Every row against the ceilings: attainable FLOP/s at an arithmetic intensity (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_kit.bench.measure import OK
from imagen_kit.bench.subject import OURS
from imagen_kit.bench.table import environment
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

    found = [point for row in content["rows"] for point in _points(row)]
    top = content["ceilings"] or {}
    if not found or not top.get("matmul") or "copy" not in top:
        raise KitError("there is nothing to draw: no ceilings, or no row with counted FLOPs and bytes")
    out = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    low, high = _range([point["intensity"] for point in found], top)
    _roofs(axes, top, low, high)
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
    axes.legend(loc="lower right", fontsize=7, frameon=True, framealpha=0.9, edgecolor="none")
    out.suptitle(environment(content), fontsize=7)
    return out


def _points(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a row that can be drawn."""
    found = []
    for who, entry in row["entries"].items():
        if entry["status"] == OK and entry["flops"] and entry["bytes"]:
            rate = entry["flops"] / entry["seconds"]["median"]
            about = {"intensity": entry["flops"] / entry["bytes"], "rate": rate, "row": row}
            found.append({**about, "who": who, "kind": row["kind"], "share": entry["percent_of_matmul"] or 0})
    return found


def _range(intensities: list[float], top: Mapping[str, Any]) -> tuple[float, float]:
    corners = [product["flops"] / top["copy"]["bytes"] for product in top["matmul"].values()]
    return min(*intensities, *corners) / 3, max(*intensities, *corners) * 3


def _roofs(axes: Axes, top: Mapping[str, Any], low: float, high: float) -> None:
    """The bandwidth as the slanted line, each precision's products as a level one from there on."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    speed = top["copy"]["bytes"]
    best = max(product["flops"] for product in top["matmul"].values())
    axes.plot([low, best / speed], [low * speed, best], color="0.2", linewidth=1.2)
    axes.annotate(
        f"copy {speed / 1e9:.0f} GB/s",
        (low * 1.2, low * 1.2 * speed),
        xytext=(2, 6),
        textcoords="offset points",
        fontsize=7,
        color="0.2",
    )
    drawn: list[float] = []
    for name, product in sorted(top["matmul"].items(), key=lambda item: -item[1]["flops"]):
        flops = product["flops"]
        axes.plot([flops / speed, high], [flops, flops], color="0.2", linewidth=0.9, linestyle="--")
        near = any(abs(flops / other - 1) < 0.25 for other in drawn)
        place = (4, -8) if near else (4, 2)
        axes.annotate(
            f"{name} {flops / 1e12:.3g} TFLOP/s",
            (flops / speed, flops),
            xytext=place,
            textcoords="offset points",
            fontsize=7,
            color="0.2",
        )
        drawn.append(flops)


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
            )


def _short(row: Mapping[str, Any]) -> str:
    options = row["options"]
    told = [str(options[key]) for key in ("dtype", "mode") if key in options]
    batch = [f"×{options['batch']}"] if "batch" in options else []
    return " ".join([row["name"], *batch, *told])

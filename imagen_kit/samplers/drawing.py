"""The picture of a tableau: which slots every row combines, and how errors grow along it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imagen_kit.errors import KitError
from imagen_kit.files import replacing
from imagen_kit.samplers.stability import SPREADS, growths
from imagen_kit.samplers.tableau import Tableau
from imagen_kit.schedules.base import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg", "jpg", "webp")
#: With more rows than this the numbers and names no longer fit into the picture.
LEGIBLE = 26
BLUE, ORANGE = "#0072B2", "#D55E00"


def save(tableau: Tableau, schedule: Schedule, title: str, path: str | Path) -> None:
    """Write ``figure(...)`` to a file, whole or not at all.

    Raises:
        KitError: a suffix that is not one of ``FORMATS``, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise KitError(f"a picture's file must end in .{', .'.join(FORMATS)}, not {path.name!r}")
    drawn = figure(tableau, schedule, title)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=160)


def figure(tableau: Tableau, schedule: Schedule, title: str) -> Figure:
    """Left: the weights, a row for every state that is computed; right: growth of errors (see ``stability``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in tableau.rows if row.computes]
    slots = list(dict.fromkeys(slot for row in rows for slot, _ in row.weights))
    width, height = _size(len(slots), 7.0, 0.42), _size(len(rows), 3.6, 0.26)
    # A Figure of its own and not pyplot: no global state, no display, and nothing to close.
    out = Figure(figsize=(width + 4.2, height + 1.1), layout="constrained")
    FigureCanvasAgg(out)
    left, right = out.subplots(1, 2, width_ratios=(width, 3.6))
    _weights(left, tableau, slots)
    _growth(right, tableau, schedule)
    noise = f"{tableau.noises} noise terms" if tableau.noises else "deterministic"
    out.suptitle(f"{title}: {tableau.nfe} evaluations, order {tableau.order}, {noise}", fontsize=10)
    return out


def _size(count: int, least: float, each: float) -> float:
    """Inches for a number of entries, of which more than can be read are squeezed."""
    return max(least, 0.8 + each * min(count, LEGIBLE))


def _weights(axes: Axes, tableau: Tableau, slots: list[str]) -> None:
    """Colour by sign and size of the weight, the number inside; a line under every row that ends a step."""
    rows = [row for row in tableau.rows if row.computes]
    table = np.full((len(rows), len(slots)), np.nan)
    for i, row in enumerate(rows):
        for slot, weight in row.weights:
            table[i, slots.index(slot)] = weight
    # Sizes span decades where a step divides by a small alpha: the colour follows a root, the number is exact.
    limit = float(np.nanmax(np.abs(table)))
    shade = np.sign(table) * np.sqrt(np.abs(table) / limit)
    image = axes.imshow(shade, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    legible = max(table.shape) <= LEGIBLE
    if legible:
        for i, j in zip(*np.nonzero(np.isfinite(table)), strict=True):
            color = "white" if abs(shade[i, j]) > 0.7 else "black"
            text = f"{table[i, j]:.2f}" if abs(table[i, j]) < 100 else f"{table[i, j]:.0e}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(slots)), slots, fontsize=7)
        axes.set_yticks(range(len(rows)), [row.state for row in rows], fontsize=7)
    for i, row in enumerate(rows):
        if row.step is not None and legible:
            axes.axhline(i + 0.5, color="0.75", linewidth=0.6)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("slots read: x start, s states, d network's x0, n noise", fontsize=8)
    axes.set_ylabel(
        "state computed, in order (a line ends a step)" if legible else "state computed, in order", fontsize=8
    )
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, aspect=30)
    ticks = np.array([-1, -0.5, 0, 0.5, 1])
    bar.set_ticks(list(ticks), labels=[f"{np.sign(v) * v * v * limit:.2g}" for v in ticks], fontsize=7)
    bar.set_label("weight", fontsize=8)


def _growth(axes: Axes, tableau: Tableau, schedule: Schedule) -> None:
    """The largest growth of an error, and the start's share of the exact sample, by the data's spread."""
    spreads = np.asarray(SPREADS)
    growth = growths(tableau, schedule, spreads)
    axes.axhline(1, color="0.6", linewidth=0.8, label="exact solution")
    axes.plot(spreads, growth.max(axis=(0, 1)), color=ORANGE, label="largest growth of an error")
    axes.plot(spreads, growth[-1, 0], color=BLUE, linestyle="--", label="noisy start → sample")
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-3), max(high, 3.0))
    axes.set_xlabel("standard deviation of the data", fontsize=8)
    axes.set_ylabel("growth, in units of the spread of x_t", fontsize=8)
    axes.set_title("linear test equation (Gaussian data)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, which="major", linewidth=0.4, color="0.9")
    axes.legend(fontsize=7, frameon=False, loc="best")

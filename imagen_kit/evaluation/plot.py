"""The picture of a comparison: quality against network evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_kit.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*Xph<>"


def tradeoff(results: dict[str, Any], path: Path) -> None:
    """Write ``figure(results)`` as a PNG, whole or not at all."""
    drawn = figure(results)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=130)


def figure(results: dict[str, Any]) -> Figure:
    """Accuracy, and distance to the converged picture, against network evaluations (log axis), side by side.

    Args:
        results: content of ``results.json``, see ``compare.run``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    # A Figure of its own and not pyplot: no global state, no display, and nothing to close.
    out = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(out)
    right, distance = out.subplots(1, 2)
    labels = list(dict.fromkeys(cell["sampler"] for cell in results["cells"]))
    for i, label in enumerate(labels):
        cells = sorted((c for c in results["cells"] if c["sampler"] == label), key=lambda c: c["nfe"])
        nfe = [cell["nfe"] for cell in cells]
        # Stochastic samplers do not converge to the same picture, so theirs are dotted.
        style = {
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": ":" if cells[0]["stochastic"] else "-",
            "color": f"C{i % 10}",
            "markersize": 5,
        }
        share = [100 * cell["accuracy"]["all"] for cell in cells]
        low = [s - 100 * cell["interval"][0] for s, cell in zip(share, cells, strict=True)]
        high = [100 * cell["interval"][1] - s for s, cell in zip(share, cells, strict=True)]
        spread = [[max(0.0, v) for v in side] for side in (low, high)]
        right.errorbar(nfe, share, yerr=spread, label=label, elinewidth=0.6, capsize=2, **style)
        distance.plot(nfe, [max(cell["rmse_first"], 1e-6) for cell in cells], label=label, **style)

    settings, reference = results["settings"], results["reference"]
    if reference is not None:
        right.axhline(100 * reference["accuracy"]["all"], color="0.5", linewidth=0.8, linestyle="--")
    right.set_ylim(-2, 102)
    right.set_ylabel("all attributes right (%), 95 % interval")
    distance.set_yscale("log")
    distance.set_ylabel("RMSE to the converged picture, first stage")
    counts = sorted({cell["nfe"] for cell in results["cells"]})
    for axes in (right, distance):
        axes.set_xscale("log")
        axes.set_xticks(_apart(counts))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("network evaluations (calls of the first stage's network)")
        axes.grid(visible=True, which="major", alpha=0.3)
    if labels:
        distance.legend(fontsize=8)
    sampler, steps = settings["reference"]
    out.suptitle(
        f"{settings['recipe'] or 'model'}: {settings['n']} {settings['split']} captions "
        f"({settings['language']}), seed {settings['seed']}; "
        f"converged: {sampler} at {steps} steps; dotted: stochastic",
        fontsize=10,
    )
    return out


def _apart(counts: list[int], factor: float = 1.08) -> list[int]:
    """The counts whose labels do not run into each other on a logarithmic axis; of two near ones the larger."""
    kept: list[int] = []
    for count in sorted(counts, reverse=True):
        if not kept or count * factor < kept[-1]:
            kept.append(count)
    return kept[::-1]

"""The page of a comparison: one file with everything in it, which asks no network for anything.

The page's own sources lie in ``page/``: a frame, a style sheet and scripts, put together here with the results.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_kit.evaluation import summary
from imagen_kit.files import replacing

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("state.js", "chart.js", "points.js", "lists.js", "main.js")


def write(results: Mapping[str, Any], path: Path) -> None:
    """Write ``render(results)``, whole or not at all."""
    text = render(results)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def data(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's scripts read: the results, their ``points`` (see ``summary``) and the ``costs``' labels."""
    points = summary.points(results)
    costs = {key: label for key, label in summary.COSTS.items() if any(p[key] is not None for p in points)}
    if summary.foremost_cost(points) == "nfe":
        costs.pop("work", None)  # no cache: the same numbers again
    return {"results": results, "points": points, "costs": costs}


def render(results: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        results: content of ``results.json``, see ``compare.run``.
    """
    # A < in the data could end the script that holds it; JSON may write it as an escape.
    embedded = json.dumps(data(results), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(f"{results['settings']['subject']}: samplers compared"),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "data": embedded,
        "script": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    before, *pieces = (PAGE / "page.html").read_text(encoding="utf-8").split("{{")
    out = [before]
    for piece in pieces:  # one pass, so that nothing in the data can be taken for a mark
        name, rest = piece.split("}}", 1)
        out += [parts[name], rest]
    return "".join(out)

"""The picture of a tableau."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers import drawing

FLOW = schedules.create("flow")


def test_the_picture_holds_every_weight() -> None:
    tableau = samplers.create("dpmpp_3m").tableau(FLOW, 8)
    figure = drawing.figure(tableau, FLOW, "dpmpp_3m")
    weights, growth = figure.axes[:2]
    shown = {text.get_text() for text in weights.texts}
    assert shown == {f"{weight:.2f}" for row in tableau.rows if row.computes for _, weight in row.weights}
    assert [label.get_text() for label in weights.get_yticklabels()] == [f"s{i}" for i in range(1, 9)]
    assert "8 evaluations, order 2, deterministic" in figure.get_suptitle()
    assert len(growth.lines) == 3


def test_a_long_tableau_is_drawn_without_numbers() -> None:
    figure = drawing.figure(samplers.create("dpmpp_sde").tableau(FLOW, 40), FLOW, "dpmpp_sde")
    assert not figure.axes[0].texts
    assert figure.get_size_inches().max() < 18


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    tableau = samplers.create("ddim").tableau(FLOW, 3)
    drawing.save(tableau, FLOW, "ddim", tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 10  # not a blank sheet
    with pytest.raises(KitError, match=r"must end in \.png"):
        drawing.save(tableau, FLOW, "ddim", tmp_path / "a.txt")
    with pytest.raises(KitError, match="cannot write"):
        drawing.save(tableau, FLOW, "ddim", tmp_path / "missing" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

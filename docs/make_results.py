"""Draw docs/results.png: the first held-out captions, in English and Chinese: python docs/make_results.py"""

from __future__ import annotations

from pathlib import Path

import imagen_kit
from imagen_kit.data.pocket import caption
from imagen_kit.evaluation.pocket import draw_scenes

COLUMNS, FONT = 4, 8


def run() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scenes = draw_scenes(3 * COLUMNS, "held_out", seed=0)
    languages = ["en"] * (2 * COLUMNS) + ["zh"] * COLUMNS
    prompts = [caption(s, lang) for s, lang in zip(scenes, languages, strict=True)]  # type: ignore[arg-type]
    images = imagen_kit.load("pocket-imagen")(prompts, seed=0)
    figure, axes = plt.subplots(3, COLUMNS, figsize=(2.2 * COLUMNS, 2.55 * 3), layout="constrained")
    for axis, picture, scene, lang in zip(axes.flat, images.tensor, scenes, languages, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        # Chinese prompts are shown translated: few machines have a font for them.
        axis.set_title(_folded(caption(scene) + (" (in Chinese)" if lang == "zh" else "")), fontsize=FONT)
        axis.axis("off")
    figure.savefig(Path(__file__).parent / "results.png", dpi=100)


def _folded(text: str) -> str:
    """On three lines at most: an object a line, then the background."""
    for relation in (" left of ", " right of ", " above ", " below "):
        text = text.replace(relation, f"{relation.rstrip()}\n")
    return text.replace(" on a ", "\non a ")


if __name__ == "__main__":
    run()

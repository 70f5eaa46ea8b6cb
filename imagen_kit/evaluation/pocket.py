"""How often a pipeline draws what a pocket caption says.

Axes: b pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from imagen_kit.data.pocket import Scene, caption, sample_scenes
from imagen_kit.data.pocket.scenes import Language, Split
from imagen_kit.errors import KitError, unknown
from imagen_kit.evaluation.judge import ATTRIBUTES, Judge
from imagen_kit.evaluation.provenance import provenance


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a proportion's true value (Wilson 1927), 95 % by default; holds near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    p, scale = right / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def draw_scenes(n: int, split: str, seed: int) -> list[Scene]:
    """The n scenes that ``evaluate`` and ``compare`` use for a split and a seed.

    Raises:
        KitError: n below 1, or an unknown split.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise KitError(f"the number of captions must be a whole number of at least 1, not {n!r}")
    if split not in get_args(Split):
        raise KitError(unknown("split", split, get_args(Split)))
    return sample_scenes(n, torch.Generator().manual_seed(seed), split)  # type: ignore[arg-type]


def summary(scores: dict[str, Tensor], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Shares of right pictures: ``accuracy`` by attribute, ``interval`` of ``all`` (95 %), by objects."""
    right = scores["all"]
    n = len(right)
    out: dict[str, Any] = {
        "n": n,
        "accuracy": {name: scores[name].double().mean().item() for name in ATTRIBUTES},
        "interval": list(wilson(int(right.sum()), n)),
    }
    for key, count in (("one_object", 1), ("two_objects", 2)):
        rows = torch.tensor([len(scene.objects) == count for scene in scenes])
        out[key] = {"n": int(rows.sum()), "all": right[rows].double().mean().item() if rows.any() else None}
    return out


def evaluate(
    pipeline: Any,
    n: int = 200,
    languages: Sequence[str] = ("en", "zh"),
    split: str = "held_out",
    seed: int = 0,
    batch_size: int | None = 50,
    *,
    sampler: Any = None,
    steps: Any = None,
    guidance: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw n captions in each language and let the judge read the pictures.

    All languages get the same scenes, and picture i the seed ``seed + i``, so languages and models can be
    compared picture by picture.

    Args:
        pipeline: prompts to pictures, as ``imagen_kit.load`` gives.
        n: captions a language.
        languages: of ``en`` and ``zh``.
        split: ``held_out`` (at least one attribute combination never trained on), ``train`` or ``all``.
        seed: of scenes and pictures.
        batch_size: pictures at a time; None = all.
        sampler, steps, guidance: as in the pipeline's call; None = the recipe's.
        progress: show bars.

    Returns:
        ``split``, ``seed``, ``languages``: for each language ``summary``'s shares, ``seconds`` and ``wrong``
        (caption, seed, wrong attributes of each wrong picture); and ``provenance``.

    Raises:
        KitError: n below 1, no or an unknown language, an unknown split; and what the pipeline raises.
    """
    scenes = draw_scenes(n, split, seed)
    if not languages:
        raise KitError(f"no language given; choose from {', '.join(get_args(Language))}")
    for language in languages:
        if language not in get_args(Language):
            raise KitError(unknown("language", language, get_args(Language)))
    judge, seeds = Judge(), [seed + i for i in range(n)]
    found: dict[str, Any] = {}
    for language in languages:
        prompts = [caption(scene, language) for scene in scenes]  # type: ignore[arg-type]
        began = time.perf_counter()
        images = pipeline(
            prompts,
            seed=seeds,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            progress=progress,
        ).tensor.cpu()  # waits for the device, so the time below is that of the pictures
        seconds = time.perf_counter() - began
        scores = judge.score(images, scenes)
        wrong = [
            {
                "caption": prompts[i],
                "seed": seeds[i],
                "wrong": [a for a in ATTRIBUTES[:-1] if not scores[a][i]],
            }
            for i in (~scores["all"]).nonzero().squeeze(1).tolist()
        ]
        found[language] = {**summary(scores, scenes), "seconds": round(seconds, 3), "wrong": wrong}
    return {"split": split, "seed": seed, "languages": found, "provenance": provenance(pipeline.device)}

"""The pocket world: captioned scenes, rendered exactly, so that everything runs offline and can be judged."""

from imagen_kit.data.pocket.dataset import PocketDataset
from imagen_kit.data.pocket.renderer import draw, place, render
from imagen_kit.data.pocket.scenes import (
    HELD_OUT,
    Obj,
    Scene,
    SceneBatch,
    caption,
    is_held_out,
    parse,
    sample_batch,
    sample_scenes,
)

__all__ = [
    "HELD_OUT",
    "Obj",
    "PocketDataset",
    "Scene",
    "SceneBatch",
    "caption",
    "draw",
    "is_held_out",
    "parse",
    "place",
    "render",
    "sample_batch",
    "sample_scenes",
]

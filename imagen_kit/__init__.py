"""imagen_kit: text-to-image diffusion out of swappable parts.

Everything here is loaded on first use; ``import imagen_kit`` itself imports nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagen_kit.denoise import denoise_fn
    from imagen_kit.errors import KitError
    from imagen_kit.pipeline import Pipeline, Stage
    from imagen_kit.zoo import load

__version__ = "0.1.0"
__all__ = ["KitError", "Pipeline", "Stage", "__version__", "denoise_fn", "load"]

_HOMES = {
    "KitError": "errors",
    "Pipeline": "pipeline",
    "Stage": "pipeline",
    "denoise_fn": "denoise",
    "load": "zoo",
}
_MODULES = (
    "caches",
    "checkpoints",
    "codecs",
    "data",
    "denoisers",
    "evaluation",
    "guidance",
    "interop",
    "prediction",
    "recipe",
    "samplers",
    "schedules",
    "text_encoders",
    "training",
    "weights",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])

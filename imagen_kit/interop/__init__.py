"""Other libraries' parts in ours, and ours in theirs: ``diffusers`` and ``k_diffusion``.

Nothing here imports those libraries before a function is called that needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("diffusers", "k_diffusion")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)

"""Other libraries' ways to do a case's work, with our weights where their networks can hold them.

Nothing here imports those libraries before a function is called that needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

from imagen_kit.errors import KitError


def library(name: str, package: str | None = None) -> Any:
    """The module ``name``.

    Args:
        name: such as ``k_diffusion.sampling``.
        package: what pip calls it; the module's first word by default.

    Raises:
        KitError: it is not installed, or does not import here.
    """
    from torch._dynamo import config

    first = name.split(".")[0]
    try:
        # k_diffusion silences the compiler's errors for the whole process when it is imported: undone here
        with config.patch(suppress_errors=config.suppress_errors):
            return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == first:
            raise KitError(f"{first} is not installed (pip install {package or first})") from error
        line = " ".join(str(error).split())[:200]
        raise KitError(f"{first} is installed, but does not import here: {line}") from error

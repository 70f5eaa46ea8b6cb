"""Where weights lie: a path of the user's, or ``package:...`` for files shipped inside the package."""

from __future__ import annotations

from pathlib import Path

from imagen_kit.errors import KitError, nearest

PREFIX = "package:"


def resolve(spec: str | Path) -> Path:
    """The file or folder that ``spec`` names.

    Args:
        spec: a path (``~`` is expanded), or ``package:pocket/t5`` for ``imagen_kit/weights/pocket/t5``.

    Raises:
        KitError: nothing is there; names the nearest entry of the folder it should be in.
    """
    text = str(spec)
    if text.startswith(PREFIX):
        inside = text.removeprefix(PREFIX)
        root = Path(__file__).resolve().parent / "weights"
        path = root / inside
        if not path.resolve().is_relative_to(root):
            raise KitError(f"weights {text!r} point outside the package; give a path without {PREFIX!r}")
    else:
        path = Path(text).expanduser()
    if path.exists():
        return path
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    hint = f"; did you mean {text[: len(text) - len(path.name)] + guess!r}?" if guess else ""
    raise KitError(f"weights {text!r} do not exist{hint}")

"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imagen_kit.errors import KitError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The temporary name keeps the suffix, since picture and plot writers choose their format by it. The content
    is on the disk before the rename, so a crash leaves the old file or the new one.

    Raises:
        KitError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; these are ordinary outputs
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | Path, *, folder: bool = False, make: bool = True) -> Path:
    """Check that ``path`` can be written, before any work is spent on what goes there.

    Args:
        path: the output file, or the output folder.
        folder: ``path`` is a folder. A file's parent folder must exist.
        make: make the folder where it is missing; otherwise only find out whether that could be done.

    Raises:
        KitError: it cannot be written, and why.
    """
    path = Path(path)
    try:
        if path.is_symlink() and not path.exists():
            raise KitError(f"cannot write {path}: it is a link that leads nowhere")
        if folder:
            if path.exists() and not path.is_dir():
                raise KitError(f"cannot write to {path}: it is a file, not a folder")
            if make:
                path.mkdir(parents=True, exist_ok=True)
        elif path.is_dir():
            raise KitError(f"cannot write {path}: it is a folder")
        elif not path.parent.is_dir():
            raise KitError(f"cannot write {path}: the folder {path.parent} does not exist")
        # Trying is the only sure test: permission bits know nothing of read-only mounts or full quotas.
        place = next(p for p in ((path, *path.parents) if folder else path.parents) if p.exists())
        with tempfile.NamedTemporaryFile(dir=place, prefix=".imagen-kit-"):
            pass
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

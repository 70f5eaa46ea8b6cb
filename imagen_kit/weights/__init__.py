"""Weights in safetensors files: saved atomically, loaded strictly. The folder also holds the shipped weights.

A weight file fits a module exactly or is refused with one line that lists what is missing, extra or
misshapen; nothing is copied into the module before the whole file has been checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError, nearest
from imagen_kit.files import replacing

_SHOWN = 4  # names listed of each sort of fault; the line says how many more there are


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors atomically: after a crash there is the old file or the whole new one.

    Args:
        path: the file to write; its folder is made where it is missing.
        tensors: any device, layout and dtype; tensors that share memory are stored once each.
        metadata: text pairs kept in the file's header.

    Raises:
        KitError: the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error
    # safetensors refuses views of one storage, which tied parameters are; loading expects a copy of each.
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        pointer = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    with replacing(path) as temporary:
        save_file(stored, temporary, {"format": "pt", **(metadata or {})})
    return path


def read_safetensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file, in the dtypes they were stored in.

    Raises:
        KitError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(str(path), device=str(device))
    except (SafetensorError, OSError) as error:
        raise KitError(f"weights {path}: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text pairs in a safetensors file's header; errors as ``read_safetensors``."""
    return dict(read_header(path).get("__metadata__", {}))


def load_strict(module: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a safetensors file into ``module``, which keeps its own device and dtype.

    Raises:
        KitError: as ``check_fit``. The module is then unchanged.
    """
    check_fit(module, path)  # a wrong 10 GB file is refused at once
    module.load_state_dict(read_safetensors(path))


def check_fit(module: nn.Module, path: str | Path) -> None:
    """Compare names and shapes of a safetensors file with those of ``module``; no tensor is read.

    Raises:
        KitError: the file is missing, truncated or not safetensors, or its tensors are not exactly the
            module's; the line lists missing, extra and misshapen tensors.
    """
    header = read_header(path)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted]
    misshapen = [
        f"{name} is {_by(shapes[name])}, should be {_by(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = [
        f"{len(names)} {sort} ({_some(names)})"
        for sort, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise KitError(f"weights {path} do not fit {type(module).__name__}: tensors " + ", ".join(faults))


def read_header(path: str | Path) -> dict[str, dict]:
    """Names, dtypes and shapes in a safetensors file, without its tensors.

    Raises:
        KitError: the file is missing, truncated or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise KitError(f"weights {path}: {_why_no_file(path)}")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if 2 <= length <= min(size, 100_000_000) else b""
    except OSError as error:
        raise KitError(f"weights {path}: cannot be read: {error.strerror}") from error
    # The same bytes begin a header of that length, so what follows is looked at first.
    if text[:1] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise KitError(
            f"weights {path}: a pickled PyTorch file, not safetensors; save its tensors as safetensors"
        )
    try:
        header = json.loads(text)
        end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        sort = "is empty" if size == 0 else "is not a safetensors file, or its header is cut off"
        raise KitError(f"weights {path}: {sort}") from error
    expected = 8 + length + end
    if size < expected:
        raise KitError(
            f"weights {path}: truncated: {size:,} of {expected:,} bytes; copy or download it again"
        )
    return header


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder, not a safetensors file"
    guess = (
        nearest(path.name, (p.name for p in path.parent.glob("*.safetensors")))
        if path.parent.is_dir()
        else None
    )
    return "no such file" + (f"; did you mean {guess}?" if guess else "")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"

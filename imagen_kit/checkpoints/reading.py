"""Opening checkpoint files and folders: nothing is read before it is needed, nothing in them is ever run."""

from __future__ import annotations

import argparse
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_kit import weights_path
from imagen_kit.checkpoints.loading import TOKENIZER, Origin, Source, Tensors
from imagen_kit.errors import KitError, nearest
from imagen_kit.weights import read_header

ORIGIN = "imagen_kit_checkpoint"  # key in the metadata of files of ours
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What of a diffusers pipeline's folder is meant when a kind is asked for; the first that is there.
COMPONENTS = {
    "denoiser": ("unet", "transformer"),
    "codec": ("vae",),
    "text_encoder": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
_NESTS = (
    "ema",
    "state_dict",
    "model",
    "model_state_dict",
    "module",
)  # where training scripts keep the tensors
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Opened:
    """A checkpoint's tensors and what is known about them.

    Attributes:
        source: the tensors.
        config: of the config.json beside them, or None.
        origin: what a file of ours says it holds, or None.
    """

    source: Source
    config: dict[str, Any] | None = None
    origin: Origin | None = None


class MappedSafetensors:
    """A safetensors file mapped into memory: tensors are views of it, read by the system when they are used.

    Changing such a tensor changes memory, never the file. The file must stay as it is while its tensors are in use;
    replacing it by another (a rename) is harmless.

    Raises:
        KitError: missing, empty, truncated, or not a safetensors file.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        header = read_header(path)
        self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise KitError(
                    f"{path}: tensor {name} has the dtype {entry['dtype']}, which is not read here"
                )
            if begin < 0 or min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
                raise KitError(f"{path}: the header is damaged: {name} has not the bytes of its shape")
            self._places[name] = (dtype, start + begin, start + end)
            self.shapes[name] = shape

    def get(self, name: str) -> Tensor:
        dtype, begin, _ = self._places[name]
        count = math.prod(self.shapes[name])
        if count == 0:
            return torch.empty(self.shapes[name], dtype=dtype)
        if begin % dtype.itemsize:  # not so in files by safetensors itself
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=begin)
            return raw.clone().view(dtype).reshape(self.shapes[name])
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).reshape(self.shapes[name])

    def release(self, name: str) -> None:
        """Let the system have the pages back that only this tensor lies on; using it again reads them again."""
        _, begin, end = self._places[name]
        first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
        if last > first and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


class Shards:
    """Several files as one source, each opened when it is listed, none read."""

    def __init__(self, name: str, sources: list[Source]):
        self.name = name
        self._homes = {key: source for source in sources for key in source.shapes}
        self.shapes = {key: source.shapes[key] for key, source in self._homes.items()}

    def get(self, name: str) -> Tensor:
        return self._homes[name].get(name)

    def release(self, name: str) -> None:
        self._homes[name].release(name)


def open_checkpoint(path: str | Path, kind: str | None = None) -> Opened:
    """A file (.safetensors, .pt, .pth, .ckpt, .bin) or a folder (config.json and tensors, one file or shards; or a
    whole diffusers pipeline, of which the part of ``kind`` is opened, the denoiser by default).

    Raises:
        KitError: nothing there, empty, truncated, not a checkpoint, a pickle with code in it, a missing shard.
    """
    place = weights_path.resolve(path)
    if place.is_dir():
        return _open_folder(place, kind)
    source = open_file(place)
    if isinstance(source, MappedSafetensors) and ORIGIN in source.metadata:
        return Opened(source, origin=_read_origin(source.name, source.metadata[ORIGIN]))
    config = place.parent / "config.json"
    beside = place.name.split(".")[0] in STEMS and config.is_file()
    return Opened(source, _read_config(place.parent) if beside else None)


def open_file(path: Path) -> Source:
    """The tensors of one file, which its first bytes tell the sort of."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise KitError(f"{path} is empty")
    # In safetensors the length of a header comes first, which may look like anything, and then its brace.
    pickled = start[8:] != b"{" and (
        start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in SUFFIXES[1:]
    )
    return _open_pickle(path, start) if pickled else MappedSafetensors(path)


def _open_pickle(path: Path, start: bytes) -> Tensors:
    """A file by torch.save, read by its restricted unpickler, which makes tensors and plain data only.

    Args:
        path: the file.
        start: its first bytes: those of a zip archive, which can be mapped, or of a bare pickle.
    """
    from pickle import UnpicklingError

    try:
        # Training scripts keep their arguments beside the tensors; a Namespace is a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            zipped = start[:2] == b"PK" and path.suffix != ".safetensors"  # torch would believe such a name
            place = str(path) if zipped else file
            content = torch.load(place, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        said = str(error).lower()  # of a class or function, or of an instruction that tensors do not need
        if "global" not in said and not ("operand" in said and start[:1] == b"\x80"):
            raise KitError(f"{path} is not a whole PyTorch file; copy or download it again") from error
        raise KitError(
            f"{path} is a pickle with code in it, which is never run here; "
            "save its tensors as safetensors where you trust it"
        ) from error
    except Exception as error:  # zip and pickle readers raise their own many kinds on damaged files
        raise KitError(f"{path} is not a whole PyTorch file; copy or download it again") from error
    return Tensors(_tensors_in(content, path), str(path))


def _tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):  # nests in nests
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if inner is None or any(isinstance(value, Tensor) for value in content.values()):
            break
        content = inner
    if not isinstance(content, Mapping):
        raise KitError(f"{path} holds a {type(content).__name__}, not named tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise KitError(f"{path} holds no tensors")
    for wrapper in ("module.", "_orig_mod."):  # DistributedDataParallel's and torch.compile's
        if all(key.startswith(wrapper) for key in tensors):
            tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return tensors


def _open_folder(folder: Path, kind: str | None) -> Opened:
    if (folder / "model_index.json").is_file():
        wanted = COMPONENTS[kind or "denoiser"] if kind in (None, *COMPONENTS) else ()
        part = next((folder / name for name in wanted if (folder / name).is_dir()), None)
        if part is None:
            there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise KitError(f"{folder} holds no {kind or 'denoiser'}; its parts are {', '.join(there)}")
        folder = part
    config = _read_config(folder) if (folder / "config.json").is_file() else None
    if config is None and (folder / "open_clip_config.json").is_file():
        config = _read_json(folder / "open_clip_config.json")
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return Opened(_open_shards(index), config)
            if (folder / f"{stem}{suffix}").is_file():
                return Opened(open_file(folder / f"{stem}{suffix}"), config)
    files = sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    if len(files) == 1:
        opened = open_checkpoint(files[0])
        return Opened(opened.source, config, opened.origin)
    what = f"several: {', '.join(f.name for f in files[:6])}; name one" if files else "none"
    raise KitError(f"{folder} should hold one file of weights or an index of shards; it holds {what}")


def _open_shards(index: Path) -> Source:
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise KitError(f"{index} has no weight_map, which names each tensor's file")
    sources = []
    for name in sorted(set(map(str, table.values()))):
        if Path(name).name != name:
            raise KitError(f"{index} names a file outside its folder: {name}")
        if not (index.parent / name).is_file():
            there = sorted(entry.name for entry in index.parent.iterdir())
            guess = nearest(name, there)
            raise KitError(
                f"{index.parent}: shard {name} is missing" + (f" (there is {guess})" if guess else "")
            )
        sources.append(open_file(index.parent / name))
    shards = Shards(str(index.parent), sources)
    lost = [key for key in table if key not in shards.shapes]
    if lost:
        raise KitError(f"{index.parent}: {len(lost)} tensors of the index are in no shard, e.g. {lost[0]}")
    return shards


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, beside):
        if any((place / name).is_file() for name in ("tokenizer.json", "spiece.model", "vocab.json")):
            return {**config, TOKENIZER: str(place)}
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KitError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise KitError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _read_origin(name: str, text: str) -> Origin:
    try:
        return Origin(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise KitError(f"{name}: its note of what it holds is damaged ({error})") from error

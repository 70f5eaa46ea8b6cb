"""Reading Hugging Face folders and hub ids: one quiet, strict way to a config, a network and its
tokenizer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from imagen_kit import weights_path
from imagen_kit.errors import KitError, nearest, unknown
from imagen_kit.text_encoders.tokenizers import PretrainedTokenizer

if TYPE_CHECKING:
    from imagen_kit.checkpoints.loading import Source as Tensors

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """Weights in a folder (``folder`` set) or on the hub (``location`` = owner/name, ``subfolder`` inside
    it)."""

    location: str
    subfolder: str = ""
    folder: Path | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.location, self.subfolder)))

    def sibling(self, name: str) -> Source:
        """The folder beside this one."""
        if self.folder is not None:
            return local(self.folder.parent / name)
        return Source(self.location, name)


def local(folder: Path) -> Source:
    return Source(str(folder), folder=folder)


def locate(weights: str | Path) -> Source:
    """A folder (path or ``package:...``) or a hub id ``owner/name`` (more segments name a folder inside it).

    Raises:
        KitError: it looks like a path and nothing, or no folder, is there.
    """
    text = str(weights)
    looks_local = isinstance(weights, Path) or text.startswith((weights_path.PREFIX, "/", ".", "~"))
    if looks_local or Path(text).exists():
        folder = weights_path.resolve(weights)
        if not folder.is_dir():
            raise KitError(
                f"weights {text!r} are a file; a folder with config.json and model.safetensors is needed"
            )
        return local(folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", text):
        raise KitError(
            f"weights {text!r} are neither an existing folder nor a hub id such as 'google/t5-v1_1-xxl'"
        )
    owner_and_name, subfolder = text.split("/")[:2], text.split("/")[2:]
    return Source("/".join(owner_and_name), "/".join(subfolder))


def config(source: Source) -> Any:
    """The transformers config of ``source``; KitError when there is none that can be read."""
    from transformers import AutoConfig

    if source.folder is not None and not (source.folder / "config.json").is_file():
        raise KitError(f"weights {str(source)!r} have no config.json; give the folder that holds one")
    return _read(
        source, "config", lambda: AutoConfig.from_pretrained(source.location, subfolder=source.subfolder)
    )


def fields(source: Source) -> dict[str, Any]:
    """The fields of the config.json of ``source``; KitError when there is none that can be read."""
    path = source.folder / "config.json" if source.folder is not None else None
    if path is not None and not path.is_file():
        raise KitError(f"weights {str(source)!r} have no config.json; give the folder that holds one")
    try:
        if path is None:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source.location, "config.json", subfolder=source.subfolder or None))
        found = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the hub's errors are many
        raise _unreadable(source, "config", error) from error
    if not isinstance(found, dict):
        raise KitError(f"config of {str(source)!r} cannot be read: it is no JSON object")
    return found


def tensors(source: Source) -> Tensors:
    """The tensors of ``source``, mapped into memory and read when they are used: one file or shards.

    Raises:
        KitError: none there, truncated, damaged, or a hub that cannot be reached.
    """
    from imagen_kit.checkpoints.reading import open_checkpoint

    try:
        return open_checkpoint(source.folder or _downloaded(source), "text_encoder").source
    except Exception as error:
        raise _unreadable(source, "weights", error) from error


def _downloaded(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    start = f"{source.subfolder}/" if source.subfolder else ""
    root = Path()
    for ending in ("safetensors", "bin"):  # pickles only where there is nothing else
        wanted = [f"{start}*.{ending}", f"{start}*.index.json"]
        root = Path(snapshot_download(source.location, allow_patterns=wanted, ignore_patterns=["*.fp16.*"]))
        if any((root / source.subfolder).glob(f"*.{ending}")):
            break
    return root / source.subfolder


def fitted(
    source: Source, found: Tensors, wanted: Mapping[str, tuple[int, ...]], what: str, spare: str = r"$^"
) -> None:
    """KitError unless ``found`` has the tensors ``wanted``, named with their shapes, and none but ``spare`` ones.

    Args:
        source, found: the weights and their tensors.
        wanted: shape of every tensor that is needed.
        what: they are for.
        spare: pattern of names that may be there beyond those.
    """
    shapes = found.shapes
    faults = [f"missing {key}" for key in sorted(wanted) if key not in shapes]
    faults += [f"extra {key}" for key in sorted(shapes) if key not in wanted and not re.match(spare, key)]
    faults += [
        f"{key} is {tuple(shapes[key])} instead of {tuple(shape)}"
        for key, shape in sorted(wanted.items())
        if key in shapes and tuple(shapes[key]) != tuple(shape)
    ]
    if faults:
        raise KitError(f"weights {str(source)!r} do not fit {what}: {shortened(faults)}")


def require_size(
    kind: str, source: Source, settings: Any, size: str | Mapping[str, Any] | None, sizes: Mapping[str, Any]
) -> None:
    """KitError unless ``settings`` are of ``size``: a name among ``sizes``, config fields, or None for any."""
    fields = sizes.get(size) if isinstance(size, str) else size or {}
    if fields is None:
        raise KitError(unknown(f"{kind} size", size, sizes))
    for key, wanted in fields.items():
        found = getattr(settings, key, None)
        if found != wanted and key in ("hidden_size", "d_model", "num_layers", "num_hidden_layers", "d_ff"):
            raise KitError(
                f"weights {str(source)!r} are not of {kind} size {size!r}: {key} is {found}, not {wanted}"
            )


def model(model_class: Any, source: Source, settings: Any, spare: str = r"$^") -> nn.Module:
    """The network of ``source``, strictly: every tensor it needs present with the right shape.

    Args:
        model_class: the transformers class to build.
        settings: its config.
        spare: pattern of tensor names the source may hold beyond the network's (a decoder, an image tower).

    Raises:
        KitError: unreadable, truncated, missing, extra or misshapen tensors, named.
    """

    def load() -> tuple[nn.Module, dict[str, Any]]:
        return model_class.from_pretrained(
            source.location,
            subfolder=source.subfolder,
            config=settings,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )

    network, info = _read(source, "weights", load)
    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"extra {key}" for key in sorted(info["unexpected_keys"]) if not re.match(spare, key)]
    faults += [
        f"{key} is {tuple(found)} instead of {tuple(wanted)}"
        for key, found, wanted in sorted(info["mismatched_keys"])
    ]
    if faults:
        raise KitError(f"weights {str(source)!r} do not fit {model_class.__name__}: {shortened(faults)}")
    return network


def first_line(error: Exception | None) -> str:
    """What another library said, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def shortened(faults: list[str]) -> str:
    """The first faults and how many more there are."""
    return "; ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")


def tokenizer(spec: str | Path) -> PretrainedTokenizer:
    """The tokenizer in a folder or on the hub; KitError when there is none."""
    place = locate(spec)
    if place.folder is not None and not _has_tokenizer(place.folder):
        raise KitError(f"tokenizer {str(spec)!r} holds none of {', '.join(TOKENIZER_FILES)}")
    return _read_tokenizer(place)


def own_tokenizer(source: Source) -> PretrainedTokenizer | None:
    """The tokenizer that comes with weights: in their folder, or in the ``tokenizer`` folder beside a
    ``text_encoder`` one, as diffusers repositories keep them. None where a local folder has neither."""
    name = source.folder.name if source.folder is not None else source.subfolder
    beside = source.sibling(name.replace("text_encoder", "tokenizer")) if "text_encoder" in name else None
    if source.folder is None:
        return _read_tokenizer(beside or source)
    for place in filter(None, (source, beside)):
        if place.folder is not None and _has_tokenizer(place.folder):
            return _read_tokenizer(place)
    return None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _read_tokenizer(place: Source) -> PretrainedTokenizer:
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(place.location, subfolder=place.subfolder)

    return PretrainedTokenizer(_read(place, "tokenizer", load))


def random_config(config_class: Any, fields: dict[str, Any], kind: str) -> Any:
    """A config from its fields; KitError for an unknown one."""
    known = {**config_class().to_dict(), "model_type": None}
    for key in fields:
        if key not in known:
            guess = nearest(key, known)
            raise KitError(
                f"{kind} size has no field {key!r}" + (f"; did you mean {guess!r}?" if guess else "")
            )
    return config_class(**{key: value for key, value in fields.items() if key != "model_type"})


def _read(source: Source, what: str, load: Callable[[], Any]) -> Any:
    try:
        with _quiet():
            return load()
    except KitError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise their own many kinds
        raise _unreadable(source, what, error) from error


def _unreadable(source: Source, what: str, error: Exception) -> KitError:
    where = "" if source.folder is not None else " (not a folder here; tried the Hugging Face hub)"
    return KitError(f"{what} of {str(source)!r} cannot be read{where}: {first_line(error)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No load reports and progress bars from transformers; faults are raised instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

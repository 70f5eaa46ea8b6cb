"""Where recipes lie, how their YAML is read, and how ``--set a.b=c`` changes it."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from imagen_kit.errors import KitError, nearest, unknown

SUFFIXES = (".yaml", ".yml")
FILE_KEYS = ("weights", "path", "file", "tokenizer")  # options that may name a file beside the recipe


def shipped_folder() -> Path:
    """The recipes that came with the kit: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside, beside = package / "recipes", package.parent / "recipes"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Names of the shipped recipes, sorted; those in sub-folders as ``folder/name``."""
    folder = shipped_folder()
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe or of the user's own.

    Raises:
        KitError: there is none, with the nearest shipped name.
    """
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    if text in names():
        folder = shipped_folder()
        return next(
            folder / f"{text}{suffix}" for suffix in SUFFIXES if (folder / f"{text}{suffix}").is_file()
        )
    if _is_file(path):
        return path
    if path.suffix in SUFFIXES and path.parent.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES]
        guess = nearest(path.name, siblings)
        hint = f"; did you mean {path.parent / guess}?" if guess else ""
        raise KitError(f"recipe file {path} does not exist{hint}")
    raise KitError(unknown("recipe", text, names()) + " (a file of your own: give its path)")


def _is_file(path: Path) -> bool:
    """Whether a file is there; no name that a file system refuses is one."""
    try:
        return path.is_file()
    except OSError:
        return False


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key given twice is a mistake, not an overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str, source: str) -> Any:
    """The value of a YAML text; KitError with line and column when it is not YAML."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)
    except (RecursionError, ValueError) as error:  # json's word for an anchor inside of itself
        raise KitError(f"{source}: a value that contains itself, or too many brackets") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise KitError(f"{source}:{where}: {error.problem}".replace("::", ":")) from error
    except yaml.YAMLError as error:
        raise KitError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    return value


def read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The map in a recipe file, upon that of the recipe it ``extends`` (a shipped name or a file beside it).

    Maps are merged key by key; lists, and parts of another name, take the place of the old ones.

    Args:
        path: the file.
        above: files that extend it, to notice a circle.

    Raises:
        KitError: unreadable, not YAML, not a map, or extending itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise KitError(f"recipe {path} cannot be read: {reason}") from error
    data = parse(text, f"recipe {path}")
    if not isinstance(data, dict):
        raise KitError(f"recipe {path} is not a map of keys (name:, text_encoder:, stages:)")
    if "extends" not in data:
        return data
    base, here = data.pop("extends"), path.resolve()
    if not isinstance(base, str):
        raise KitError(f"recipe {path}: extends: must be a recipe's name or file, not {base!r}")
    beside = path.parent / base
    origin = (beside if beside.is_file() else find(base)).resolve()
    if origin in (*above, here):
        raise KitError(f"recipe {path}: extends: {base} extends this one in turn")
    return merged(localised(read(origin, (*above, here)), origin.parent), data)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` upon ``base``, see ``read``."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name") in (None, old.get("name")):
            value = merged(old, value)
        out[key] = value
    return out


def localised(value: Any, folder: Path, key: str = "") -> Any:
    """``value`` in which the names of files that lie in ``folder`` are full paths."""
    if isinstance(value, dict):
        return {name: localised(item, folder, name) for name, item in value.items()}
    if isinstance(value, list):
        return [localised(item, folder, key) for item in value]
    if key in FILE_KEYS and isinstance(value, str) and (folder / value).exists():
        return str((folder / value).resolve())
    return value


def override(data: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """``data`` with every ``path=value`` applied; it is changed in place and returned.

    A path is dotted; an item of a list is named by its number or by its ``name``
    (``stages.base.sampler.steps=8``). The number after the last one appends. Values are YAML. Maps on the way
    are made where they are missing, so that a wrong key is reported with all other faults of the recipe.

    Raises:
        KitError: no ``=``, or a path that leads nowhere.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise KitError(f"--set {assignment!r}: write it as key.key=value, e.g. stages.0.sampler.steps=10")
        holder: Any = data
        for depth, key in enumerate(keys[:-1]):
            holder = _step(holder, key, f"--set {'.'.join(keys[: depth + 1])}")
        _assign(holder, keys[-1], parse(text, f"--set {path}"), f"--set {path}")
    return data


def _step(holder: Any, key: str, where: str) -> Any:
    """The map or list under ``key``; a part given by its bare name becomes a map, a missing map is made."""
    slot: Any = _index(holder, key, where) if isinstance(holder, list) else key
    inner = holder[slot] if isinstance(holder, list) and slot < len(holder) else None
    if isinstance(holder, dict):
        inner = holder.get(slot)
    if isinstance(inner, str):
        inner = {"name": inner}
    elif inner is None:
        inner = {}
    elif not isinstance(inner, dict | list):
        raise KitError(f"{where}: is {inner!r}, which has no keys")
    _assign(holder, key, inner, where)
    return inner


def _assign(holder: Any, key: str, value: Any, where: str) -> None:
    if isinstance(holder, dict):
        holder[key] = value
        return
    index = _index(holder, key, where)
    holder[index : index + 1] = [value]


def _index(items: list[Any], key: str, where: str) -> int:
    if key.isdecimal():
        if int(key) <= len(items):
            return int(key)
        raise KitError(f"{where}: there are only {len(items)} items, counted from 0")
    labels = [item.get("name") if isinstance(item, dict) else item for item in items]
    if key in labels:
        return labels.index(key)
    choices = [str(label) for label in labels if label is not None]
    raise KitError(f"{where}: " + unknown("item", key, choices))

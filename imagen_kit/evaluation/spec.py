"""Parts written on a command line: ``ddim``, ``edm:s_churn=40:spacing=karras``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import yaml

from imagen_kit.errors import KitError
from imagen_kit.recipe import check

GRID_OPTIONS = ("spacing", "final", "offset", "rho")
"""Options of a recipe's sampler that a swapped one keeps."""
OWN, NO_CACHE = "own", "none"
"""The step cache that the recipe names, or none where it names none; and none."""


@dataclass(frozen=True)
class Entry:
    """One sampler of a comparison, with a step cache or without.

    Attributes:
        label: what tables and plots call it.
        sampler: the object.
        part: what a recipe would say of it: its name and the options that were given.
        cache: a step cache of the first stage's network, None for none, or ``OWN``.
    """

    label: str
    sampler: Any
    part: dict[str, Any] = field(default_factory=dict, compare=False)
    cache: Any = OWN

    @property
    def facts(self) -> dict[str, Any]:
        """``name``, ``order`` and ``options``, as JSON writes them, those of a cache among the options."""
        options = _plain(self.sampler)
        if is_dataclass(self.cache):
            options["cache"] = type(self.cache).__name__
            options.update({f"cache.{key}": value for key, value in _plain(self.cache).items()})
        return {
            "name": getattr(self.sampler, "name", type(self.sampler).__name__),
            "order": getattr(self.sampler, "order", None),
            "options": options,
        }


def _plain(part: Any) -> dict[str, Any]:
    """The options of a part as JSON writes them."""
    options = {f.name: getattr(part, f.name) for f in fields(part)} if is_dataclass(part) else {}
    return {k: v if isinstance(v, bool | int | float | str | None) else repr(v) for k, v in options.items()}


def parse_part(text: str) -> tuple[str, dict[str, Any]]:
    """``"edm:s_churn=40"`` → ("edm", {"s_churn": 40}); values as YAML writes them.

    Raises:
        KitError: an option without ``=`` or given twice.
    """
    name, *pairs = (word.strip() for word in text.split(":"))
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise KitError(f"{text!r}: write options as NAME:OPTION=VALUE, not {pair!r}")
        if key in options:
            raise KitError(f"{text!r}: option {key!r} is given twice")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[key] = value
    return name, options


def create(kind: str, text: str, keep: Mapping[str, Any] | None = None) -> Any:
    """Build a part from its text.

    Args:
        kind: ``sampler``, ``schedule``, ...
        text: see ``parse_part``.
        keep: options to add where the part takes them and the text does not give them.

    Raises:
        KitError: unknown name or option, or a value of the wrong type or range.
    """
    name, options = checked(kind, text, keep)
    return check.registries()[kind].create(name, **options)


def make_entries(texts: Sequence[str], keep: Mapping[str, Any] | None = None) -> list[Entry]:
    """Samplers from their texts, without doubles, in the order given; KitError as in ``create``."""
    entries = []
    for text in dict.fromkeys(texts):
        name, options = checked("sampler", text, keep)
        sampler = check.registries()["sampler"].create(name, **options)
        entries.append(Entry(text, sampler, {"name": name, **options}))
    return entries


def with_caches(entries: Sequence[Entry], texts: Sequence[str], own: bool = False) -> list[Entry]:
    """Every sampler with every cache.

    Args:
        entries: the samplers.
        texts: caches, see ``parse_part``; ``none`` is none.
        own: whether the recipe has a cache of its own, from which none is then told apart.

    Raises:
        KitError: as in ``create``.
    """
    out = []
    for entry in entries:
        for text in dict.fromkeys(texts):
            cache = None if text == NO_CACHE else create("cache", text)
            plain = cache is None and not own
            out.append(replace(entry, label=entry.label if plain else f"{entry.label} + {text}", cache=cache))
    return out


def checked(kind: str, text: str, keep: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Name and options of a part's text, with those of ``keep`` that the part takes; KitError as in ``create``."""
    registry = check.registries()[kind]
    name, options = parse_part(text)
    missing = set(registry.check(name, {}))
    for key, value in (keep or {}).items():
        if set(registry.check(name, {key: value})) <= missing:
            options.setdefault(key, value)
    for fault in check.option_faults(registry, {"name": name, **options}, kind):
        raise KitError(f"{text!r}: {fault.path.removeprefix(kind + '.')}: {fault.message}")
    return name, options


def grid_options(sampler: Any) -> dict[str, Any]:
    """The grid options of a sampler, for others to keep."""
    return {key: getattr(sampler, key) for key in GRID_OPTIONS if hasattr(sampler, key)}

"""Suites: YAML files that say which rows to measure.

description: what it is for
protocol: {least: 3, seconds: 2}       # see bench.clock.Protocol
processes: one                          # one worker for all, or one a model (default)
cases:
  - kind: denoiser                      # a registered kind of subject
    name: [dit_s_2, dit_b_2]            # lists multiply, here and in the options
    options: {batch: [1, 8], dtype: [fp32, bf16]}
    when: {device: cuda, memory: 40}    # only there; memory in GiB, at least
    tiny: {name: dit_s_8, options: {batch: [1, 2]}}    # in its place where code is tried and not speed
when: {device: cuda}                    # of all its cases
include: [cpu]                          # other suites, whose cases come first
shared: {small: &small {width: 128}}    # a place for YAML's anchors; not read
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.subject import Case
from imagen_kit.errors import KitError, nearest, unknown
from imagen_kit.recipe.source import SUFFIXES, parse
from imagen_kit.recipe.spec import structure_faults

GIB = 2**30


class When(BaseModel):
    """Where an entry is measured."""

    model_config = ConfigDict(extra="forbid", strict=True)
    device: Literal["cpu", "cuda"] | None = None
    memory: float = 0.0


class Tiny(BaseModel):
    """What takes an entry's place in a trial; None is as in the entry, options are merged."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str | list[str] | None = None
    options: dict[str, Any] = {}


class Entry(BaseModel):
    """Cases that differ in a grid of options."""

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: str = Field(min_length=1)
    name: str | list[str]
    options: dict[str, Any] = {}
    when: When = When()
    tiny: Tiny = Tiny()

    def shrunk(self) -> Entry:
        """The entry with its ``tiny`` in place, for any device."""
        update = {"name": self.tiny.name or self.name, "options": {**self.options, **self.tiny.options}}
        return self.model_copy(update={**update, "when": When()})

    def within(self, when: When) -> Entry:
        """The entry where its suite is measured."""
        memory = max(when.memory, self.when.memory)
        return self.model_copy(update={"when": When(device=self.when.device or when.device, memory=memory)})

    def cases(self) -> Iterator[Case]:
        """Every combination, the last option varying fastest."""
        names = [self.name] if isinstance(self.name, str) else self.name
        choices = [value if isinstance(value, list) else [value] for value in self.options.values()]
        for name in names:
            for values in itertools.product(*choices):
                yield Case(self.kind, name, dict(zip(self.options, values, strict=True)))


class SuiteSpec(BaseModel):
    """A suite's file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    description: str = ""
    protocol: dict[str, Any] = {}
    processes: Literal["one", "model"] = "model"
    include: list[str] = []
    when: When = When()
    shared: dict[str, Any] = {}
    cases: list[Entry] = []


@dataclass(frozen=True)
class Suite:
    """What a suite comes to on one device.

    Attributes:
        name: of its file.
        description: what it is for.
        cases: its rows, each id once.
        protocol: how they are measured.
        one_process: see ``engine.Plan``.
    """

    name: str
    description: str
    cases: list[Case]
    protocol: Protocol
    one_process: bool

    def only(self, pattern: str) -> Suite:
        """The rows whose id contains ``pattern``, or matches it where it has ``*`` or ``?``.

        Raises:
            KitError: none does.
        """
        from fnmatch import fnmatch

        wild = any(sign in pattern for sign in "*?")
        kept = [c for c in self.cases if (fnmatch(c.id, pattern) if wild else pattern in c.id)]
        if not kept:
            near = nearest(pattern, [case.id for case in self.cases] + [case.name for case in self.cases])
            hint = (
                f"; did you mean {near!r}?" if near else f", e.g. {self.cases[0].id!r}" if self.cases else ""
            )
            raise KitError(f"suite {self.name}: no row matches {pattern!r}{hint}")
        return replace(self, cases=kept)


def shipped_folder() -> Path:
    """The suites that came with the kit: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside, beside = package / "suites", package.parent / "benchmarks" / "suites"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Names of the shipped suites, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*") if path.suffix in SUFFIXES)


def load(name_or_path: str | Path, device: torch.device, tiny: bool = False) -> Suite:
    """A shipped suite or a YAML file, for a device.

    Args:
        name_or_path: which.
        device: where its rows will be measured.
        tiny: every entry in its tiny form, to try the code path.

    Raises:
        KitError: there is none, or everything that is wrong in it.
    """
    path = find(name_or_path)
    spec = _read(path)
    return Suite(
        path.stem,
        spec.description,
        chosen(_entries(spec, path, ()), device, tiny),
        Protocol.of(spec.protocol),
        spec.processes == "one" or device.type == "cuda",
    )


def _read(path: Path) -> SuiteSpec:
    try:
        data = parse(path.read_text(encoding="utf-8"), f"suite {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"suite {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise KitError(f"suite {path} is not a map of keys (description:, cases:)")
    if faults := list(structure_faults(SuiteSpec, data)):
        raise KitError(f"suite {path}: " + "; ".join(map(str, faults)))
    return SuiteSpec.model_validate(data)


def _entries(spec: SuiteSpec, path: Path, above: tuple[Path, ...]) -> list[Entry]:
    """Those of the suites that ``spec`` includes, and its own."""
    entries: list[Entry] = []
    for name in spec.include:
        beside = path.parent / name
        inner = beside if beside.is_file() else find(name)
        if inner in (*above, path):
            raise KitError(f"suite {path}: include: {name} includes this one in turn")
        entries += _entries(_read(inner), inner, (*above, path))
    return [*entries, *(entry.within(spec.when) for entry in spec.cases)]


def chosen(entries: list[Entry], device: torch.device, tiny: bool = False) -> list[Case]:
    """The cases of the entries that are for this device, each once; all of them in their tiny form."""
    memory = _memory(device) / GIB
    taken = [entry.shrunk() for entry in entries] if tiny else entries
    fitting = (e for e in taken if e.when.device in (None, device.type) and e.when.memory <= memory)
    return list({case.id: case for entry in fitting for case in entry.cases()}.values())


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped suite or of one's own; KitError with the nearest shipped name otherwise."""
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    if text in names():
        return next(file for file in shipped_folder().glob(f"{text}.*") if file.suffix in SUFFIXES)
    if path.is_file():
        return path
    raise KitError(unknown("suite", text, names()) + " (a file of your own: give its path)")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

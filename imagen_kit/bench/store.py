"""The results file: rows beside what they were measured with, kept from run to run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import FAILED, Row
from imagen_kit.errors import KitError
from imagen_kit.evaluation.provenance import versions, write_json
from imagen_kit.files import require_writable

#: Measured beside us or working inside of us: libraries whose version makes a figure another one.
LIBRARIES = ("diffusers", "transformers", "k-diffusion", "imagen-pytorch", "xformers", "torchao", "triton")
FILE = "results.json"


def environment(device: torch.device) -> dict[str, Any]:
    """``device`` in words, its ``kind``, ``cores``, ``threads``, ``memory`` in bytes, ``driver``, ``versions``."""
    found = versions()
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    about: dict[str, Any] = {"kind": device.type, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        words = driver.read_text().split() if driver.is_file() else []
        about |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        about["driver"] = next((word for word in words if word[:1].isdigit() and "." in word), None)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        about |= {"device": _cpu(), "memory": memory}
    return {**about, "versions": found}


def _cpu() -> str:
    """A CPU's model, where the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()} CPU"


def results_file(output: Path) -> Path:
    """``output`` itself where it names a JSON file, else ``results.json`` in that folder."""
    return output if output.suffix == ".json" else output / FILE


def read(path: Path) -> dict[str, Any]:
    """The content of a results file (or of that in a folder).

    Raises:
        KitError: it is not there, or is not one.
    """
    file = results_file(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KitError(f"results file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise KitError(f"results file {file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not {"rows", "environment", "protocol"} <= set(content):
        raise KitError(f"{file} is not a results file of imagen-kit bench")
    return content


class Results:
    """Rows as they are finished, on the disk at once.

    Args:
        output: a JSON file or a folder.
        about: ``environment(device)``.
        protocol: how rows are measured.
        suite: what is being run, in a word.
        fresh: forget what an older file holds.

    Raises:
        KitError: the file there was made on another device, with other versions or by another protocol.
    """

    def __init__(
        self, output: Path, about: dict[str, Any], protocol: Protocol, suite: str = "", fresh: bool = False
    ):
        self.file = results_file(output)
        require_writable(self.file.parent, folder=True)
        self.content: dict[str, Any] = {
            "suite": suite,
            "environment": about,
            "protocol": protocol.as_dict(),
            "date": "",
            "command": "",
            "seconds": 0.0,
            "ceilings": None,
            "not_run": [],
            "rows": [],
        }
        if self.file.exists() and not fresh:
            self._resume(read(self.file))

    def _resume(self, old: dict[str, Any]) -> None:
        for part in ("environment", "protocol"):
            for key, (before, now) in differing(old[part], self.content[part]).items():
                raise KitError(
                    f"{self.file} was made with {key} = {before!r}, not {now!r}; "
                    "choose another file, or --fresh to overwrite it"
                )
        self.content |= {key: old[key] for key in ("ceilings", "rows", "seconds") if key in old}

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def finished(self) -> set[str]:
        """Ids of the rows that need no second run: all but those that failed."""
        return {row["id"] for row in self.rows if row["status"] != FAILED}

    def add(self, row: Row) -> None:
        """Keep a row in the place of an older one."""
        self.content["rows"] = [old for old in self.rows if old["id"] != row["id"]] + [row]
        self.save()

    def save(self) -> None:
        """Write the file."""
        program, *arguments = sys.argv or [""]
        self.content["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content["command"] = shlex.join([Path(program).name, *arguments])
        write_json(self.file, self.content)


def differing(before: Any, now: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path → (before, now) of all that differs between two maps."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        parts = (differing(before.get(k), now.get(k), f"{at}.{k}" if at else k) for k in keys)
        return {path: pair for part in parts for path, pair in part.items()}
    return {} if before == now else {at: (before, now)}

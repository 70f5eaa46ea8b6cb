"""The folder of a comparison: what was measured under which settings, written so that nothing is lost.

``results.json`` is replaced as a whole after every cell; the converged results of each guidance scale and seed
lie in ``converged/``, as long as cells may be added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from imagen_kit.errors import KitError
from imagen_kit.evaluation.drawing import Drawn
from imagen_kit.evaluation.provenance import provenance, write_json
from imagen_kit.files import replacing, require_writable

FORMAT = 2  # of results.json
PACKED = torch.contiguous_format
RESULTS, CONVERGED = "results.json", "converged"
KEY = ("sampler", "steps", "guidance", "seed")  # what tells one cell from another


def read(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's ``results.json``.

    Raises:
        KitError: no such file, or not one of this format.
    """
    file = Path(folder) / RESULTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KitError(f"there is no {file}; give the folder of a comparison") from None
    except (OSError, ValueError) as error:
        raise KitError(f"{file} is not a comparison's results; choose another folder") from error
    parts = {"settings": dict, "cells": list, "samplers": dict, "references": list, "qualities": list}
    if not isinstance(found, dict) or "format" not in found:
        raise KitError(f"{file} is not a comparison's results; choose another folder")
    if found["format"] != FORMAT or not all(isinstance(found.get(k), v) for k, v in parts.items()):
        raise KitError(
            f"{file} has format {found['format']!r}, not {FORMAT}: another version of imagen-kit wrote it; "
            "choose another folder, or delete it"
        )
    return found


class Store:
    """Results of one comparison, in memory and on the disk.

    Args:
        folder: made where it is missing, when there is something to keep.
        settings: everything that must be equal for numbers to stand in one table.
        device: for the record.

    Raises:
        KitError: the folder holds results of other settings, naming one, or cannot be written.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], device: Any = "cpu"):
        self.folder, self.device = Path(folder), device
        self.file = self.folder / RESULTS
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in a file
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "settings": settings,
            "qualities": [],
            "samplers": {},
            "references": [],
            "cells": [],
        }
        require_writable(self.folder, folder=True, make=False)
        if self.file.exists():
            self.content = read(self.folder)
            self._same("", self.content["settings"], settings)

    def _same(self, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key in {**now, **before}:
            if now.get(key) != before.get(key):
                raise KitError(
                    f"{self.file}: {what}was made with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                    "choose another folder, or delete it"
                )

    def add_sampler(self, label: str, facts: dict[str, Any]) -> None:
        """Note what a label stands for; KitError when it stood for something else before."""
        facts = json.loads(json.dumps(facts))
        before = self.content["samplers"].get(label)
        if before is not None:
            self._same(f"sampler {label!r} ", before["options"], facts["options"])
        self.content["samplers"][label] = facts

    def has(self, **key: Any) -> bool:
        """Has this cell been finished?"""
        return any(all(cell[name] == key[name] for name in KEY) for cell in self.content["cells"])

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a finished cell, on the disk when this returns."""
        self.content["cells"].append(cell)
        self.save()

    def converged(self, guidance: float | None, seed: int) -> Drawn | None:
        """The converged results of a guidance scale and seed; None where they have to be drawn (again)."""
        if not any(r["guidance"] == guidance and r["seed"] == seed for r in self.content["references"]):
            return None
        try:
            kept = load_file(self._converged_file(guidance, seed))
            return Drawn(kept["first"], kept["final"], {}, {}, 0.0)
        except (OSError, SafetensorError, KeyError):
            return None

    def add_converged(self, guidance: float | None, seed: int, drawn: Drawn, row: dict[str, Any]) -> None:
        """Keep converged results and what is known of them."""
        file = self._converged_file(guidance, seed)
        require_writable(file.parent, folder=True)
        with replacing(file) as temporary:
            # Copies, as a single stage's two are one tensor; packed, as models may answer in channels-last.
            packed = {key: getattr(drawn, key).clone(memory_format=PACKED) for key in ("first", "final")}
            save_file(packed, temporary)
        rest = [r for r in self.content["references"] if (r["guidance"], r["seed"]) != (guidance, seed)]
        self.content["references"] = [*rest, {"guidance": guidance, "seed": seed, **row}]
        self.save()

    def _converged_file(self, guidance: float | None, seed: int) -> Path:
        scale = "own" if guidance is None else f"{guidance:g}"
        return self.folder / CONVERGED / f"guidance-{scale}-seed-{seed}.safetensors"

    def save(self) -> None:
        """Write ``results.json``; the folder is made by the first one."""
        require_writable(self.folder, folder=True)
        self.content["provenance"] = provenance(self.device)
        write_json(self.file, self.content)

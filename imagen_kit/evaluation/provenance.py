"""Where numbers come from: machine, library versions, date and command, for every results file."""

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

from imagen_kit.files import replacing

LIBRARIES = ("imagen-kit", "torch", "transformers", "open-clip-torch", "timm", "accelerate", "numpy")


def device_name(device: torch.device | str) -> str:
    """A device in words, e.g. ``NVIDIA H200`` or ``x86_64 CPU``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU"
    return str(device)


def versions() -> dict[str, str]:
    """Versions of Python and of those of ``LIBRARIES`` that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build tag, e.g. +cu130
    return found


def provenance(device: torch.device | str) -> dict[str, Any]:
    """``device``, ``threads``, ``cores``, ``versions``, ``date`` (UTC) and ``command`` of this process."""
    program, *arguments = sys.argv or [""]
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(program).name, *arguments]),
    }


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON so that a reader sees the old file or the new one; KitError where it cannot."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

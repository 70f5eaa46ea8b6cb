"""Recorded reference networks as folders that the encoders load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "text_encoders"


@dataclass(frozen=True)
class Reference:
    """A recorded network: its config, weights under their published names, inputs and outputs."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rounding: dict[str, float]

    def tolerance(self, output: str) -> float:
        """Three times the recorded distance between the reference's own float32 and float64 runs."""
        return 3 * max(2e-6, self.rounding[output])

    def folder(self, path: Path, **config: Any) -> Path:
        """``path`` as a Hugging Face folder of this network."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps({**self.config, **config}))
        save_file(self.weights, path / "model.safetensors", metadata={"format": "pt"})
        return path


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    def load(name: str) -> Reference:
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
        folder = DATA if (DATA / f"{name}.safetensors").is_file() else DATA.parent / "checkpoints"
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118 - not a dict
                part, inner = key.split(".", 1)
                if part in parts:
                    parts[part][inner] = file.get_tensor(key).contiguous()
        rounding = json.loads(metadata["max_abs_diff_to_float64_run"])
        return Reference(json.loads(metadata["config"]), **parts, rounding=rounding)

    return load


@pytest.fixture(scope="session")
def published_keys() -> Callable[[str], tuple[dict[str, tuple[int, ...]], set[str]]]:
    """Tensor names and shapes of a published full-size network, and the names a file may leave out."""

    def load(name: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        facts = json.loads((DATA / f"{name}.json").read_text())
        return {key: tuple(shape) for key, shape in facts["keys"].items()}, set(facts["optional_keys"])

    return load


@pytest.fixture(scope="session")
def saved() -> Callable[[Any, Path], Path]:
    """Write a T5 network as a Hugging Face folder."""

    def save(network: Any, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(vars(network.settings)))
        save_file(network.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        return path

    return save


def token_lists(ids: Tensor, lengths: Tensor | list[int]) -> list[list[int]]:
    """Unpadded token ids of a padded batch."""
    return [row[: int(n)].tolist() for row, n in zip(ids, lengths, strict=True)]


@pytest.fixture(scope="session")
def unpadded() -> Callable[[Tensor, Tensor | list[int]], list[list[int]]]:
    return token_lists


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

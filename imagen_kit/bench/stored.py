"""Random weights of a T5 encoder as files, in Hugging Face's layout: what a downloaded one is read from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.hollow import hollow
from imagen_kit.text_encoders.t5 import SIZES
from imagen_kit.text_encoders.t5_network import T5Network, T5Settings
from imagen_kit.text_encoders.t5_weights import RandomWeights

SPARE = 1 << 30  # bytes of a disk left free


def write(size: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write an encoder's ``config.json`` and one file for each block; its bytes.

    All blocks have the numbers of the first, which alone are drawn: an XXL encoder (9.5 GB in bfloat16) is a
    matter of writing.

    Args:
        size: one of the text encoder ``t5``'s, ``xxl`` for instance.
        folder: an empty one.
        dtype: in which they are stored.

    Raises:
        KitError: a disk without room for them.
    """
    from safetensors.torch import save_file

    settings = T5Settings.of(SIZES[size], strict=True)
    with hollow():
        network = T5Network(settings)
    names = list(network.state_dict())
    source = RandomWeights(network, seed=0)
    total = sum(tensor.numel() for tensor in network.state_dict().values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < total + SPARE:
        raise KitError(
            f"{folder} has {free / 1e9:.1f} GB free; a t5 of size {size} needs {(total + SPARE) / 1e9:.1f} GB"
        )
    first: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    for number in range(settings.num_layers + 1):
        block = f"encoder.block.{number}."
        mine = [name for name in names if name.startswith(block)]
        if number == settings.num_layers:
            mine = [name for name in names if not name.startswith("encoder.block.")]
        file = f"model-{number + 1:05d}-of-{settings.num_layers + 1:05d}.safetensors"
        held = {}
        for name in mine:
            leaf = name.removeprefix(block)
            if leaf not in first:
                first[leaf] = source.get(name).to(dtype)
            held[name] = first[leaf]
        save_file(held, folder / file)
        place |= dict.fromkeys(mine, file)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": place}
    )
    _write_json(folder / "config.json", {"architectures": ["T5EncoderModel"], **SIZES[size]})
    return total


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")

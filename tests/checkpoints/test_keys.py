"""Key maps of the published checkpoints load strictly against our full-size modules, on the meta device."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from imagen_kit import checkpoints
from imagen_kit.checkpoints import loading
from imagen_kit.checkpoints.rules import Ignore

KEYS = sorted((Path(__file__).parents[1] / "data" / "keys").glob("*.json.gz"))
# Arguments that no shape tells: two published models differ in them alone.
UNTOLD = {"sdxl_vae_diffusers": ("scale",)}


def read(path):
    entry = json.loads(gzip.decompress(path.read_bytes()))
    return entry, {name: tuple(shape) for name, shape in entry["keys"].items()}


@pytest.mark.parametrize("path", KEYS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_checkpoint(path):
    entry, shapes = read(path)
    source = loading.Tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    part, origin = loading.recognise(source, config=entry["config"])
    format = checkpoints.get(origin.format)
    assert checkpoints.detect(shapes).format is format, "the tensors alone tell the format"
    module = loading.hollow(origin)
    assert not any(p.device.type != "meta" for p in module.parameters())

    steps = loading.fitted(module, part, format, origin.kwargs)
    filled = {}
    for step in steps:
        if not isinstance(step.rule, Ignore):
            filled |= step({name: part.get(name) for name in step.sources})
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in filled.items()} == wanted
    assert sum(tensor.numel() for tensor in source.tensors.values()) == entry["num_elements"]


@pytest.mark.parametrize("path", KEYS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_size_without_a_config(path):
    """Shapes and the table of published sizes lead to the same network as the config does."""
    entry, shapes = read(path)
    source = loading.Tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    (_, bare), (_, told) = loading.recognise(source), loading.recognise(source, config=entry["config"])
    untold = UNTOLD.get(path.name.removesuffix(".json.gz"), ())
    assert {k: v for k, v in bare.arguments().items() if k not in untold} == {
        k: v for k, v in told.arguments().items() if k not in untold
    }

"""Finding the format of a file, and adding one as the package's docstring says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_files import DIT, random_tensors

from imagen_kit import checkpoints
from imagen_kit.checkpoints import formats
from imagen_kit.checkpoints.formats import Format, Shapes, detect, register
from imagen_kit.checkpoints.rules import Rename
from imagen_kit.errors import KitError

VAE = {"channels": 4, "widths": [32], "blocks": 1, "groups": 32, "quant": True, "attend": True}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture
def mine():
    """A newcomer's format: DiT with its blocks called layers, registered for one test."""
    official = checkpoints.get("dit_official")

    def configure(shapes, config):
        named = {name.replace("layers.", "blocks."): shape for name, shape in shapes.items()}
        return official.configure(Shapes(named), config)

    def rules(arguments):
        return [Rename("layers.{i}.{rest}", "blocks.{i}.{rest}"), *official.rules(arguments)]

    new = Format(
        "dit_mine", "denoiser", "dit", "official", configure, rules, has=("layers.{i}.attn.qkv.weight",)
    )
    yield register(new)
    del formats._formats["dit_mine"]


def test_a_new_format(mine, dit):
    renamed = {name.replace("blocks.", "layers."): tensor for name, tensor in dit.items()}
    module = checkpoints.from_state_dict(renamed)
    assert module.checkpoint_origin.format == "dit_mine"
    want = checkpoints.from_state_dict(dit).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in module.state_dict().items())
    del renamed["layers.1.attn.proj.bias"]
    with pytest.raises(KitError, match=r"1 missing \(layers\.1\.attn\.proj\.bias\)"):
        checkpoints.from_state_dict(renamed)


def test_registration_is_checked(mine):
    with pytest.raises(KitError, match="'dit_mine' is registered twice"):
        register(mine)
    for change, said in (
        ({"kind": "denoisr"}, "did you mean 'denoiser'"),
        ({"layout": "difusers"}, "'diffusers'"),
    ):
        with pytest.raises(KitError, match=said):
            register(dataclasses.replace(mine, name="dit_other", **change))
    assert "dit_other" not in checkpoints.names()
    with pytest.raises(KitError, match="did you mean 'dit_mine'"):
        checkpoints.get("dit_mined")


def test_every_format_names_a_registered_part():
    from importlib import import_module

    for name in checkpoints.names():
        format = checkpoints.get(name)
        registry = import_module(f"imagen_kit.{format.kind}s").registry
        assert format.part in registry.names(), name
        assert format.has, name
        assert format.layout == "official" or format.config is not None, name


def test_whole_systems_are_taken_apart_by_kind():
    file = {
        f"first_stage_model.{name}": shape
        for name, shape in shapes_of(random_tensors("kl_official", VAE)).items()
    }
    assert detect(file).format.name == "kl_official"
    assert detect(file).prefix == "first_stage_model."
    file |= shapes_of(random_tensors("dit_official", DIT))
    assert detect(file).format.name == "dit_official"
    assert detect(file, kind="codec").format.name == "kl_official"
    with pytest.raises(KitError, match="no architecture known"):
        detect(file, kind="text_encoder")


def test_the_config_s_class_decides(dit, dit_diffusers):
    both = shapes_of(dit | dit_diffusers)
    with pytest.raises(KitError, match=r"fit several formats \(dit_.*, dit_.*\); name one"):
        detect(both)
    assert detect(both, {"_class_name": "DiTTransformer2DModel"}).format.name == "dit_diffusers"
    assert detect(both, {"_class_name": "SomethingNew"} | {"architectures": ["DiTTransformer2DModel"]})


def test_shapes():
    shapes = Shapes({"a.0.x": (1,), "a.10.x": (2,), "a.10.y": (3,), "b": ()})
    assert shapes.count("a.{i}.{rest}") == 2
    assert shapes.count("a.{i}.y") == 1
    assert shapes.has("a.{i}.y")
    assert not shapes.has("c")
    assert shapes["b"] == ()
    assert shapes.get("c", 5) == 5
    with pytest.raises(
        KitError, match=r"missing tensor a\.0\.z \(there is a\.0\.x\), which tells the network's size"
    ):
        shapes["a.0.z"]

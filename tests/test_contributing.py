"""The recipes for newcomers in CONTRIBUTING.md, followed to the letter."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from imagen_kit import checkpoints, denoise_fn, denoisers, samplers, schedules
from imagen_kit.checkpoints import formats
from imagen_kit.errors import KitError

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def followed():
    """Names defined by the code block of a section; what it registered is taken out again afterwards."""
    added = []

    def follow(section: str, registry, name: str) -> dict:
        part = TEXT.split(f"## {section}")[1]
        code = textwrap.dedent(re.search(r"```python\n(.*?)```", part, re.S).group(1))
        names: dict = {"__name__": f"tests.{name}"}
        exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
        if registry is not None:
            added.append((registry, name))
        return names

    yield follow
    for registry, name in added:
        registry._factories.pop(name)
        registry._facts.pop(name)


def test_add_a_sampler(followed):
    followed("Add a sampler", samplers.registry, "my_sampler")
    schedule = schedules.create("cosine")
    denoise = denoise_fn(lambda x, t: x * 0.5, schedule, prediction="eps")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, ddim = (samplers.create(n).sample(denoise, x, schedule, steps=7) for n in ("my_sampler", "ddim"))
    torch.testing.assert_close(mine, ddim, atol=1e-12, rtol=1e-12)  # the example is DDIM at eta = 0
    assert samplers.describe("my_sampler")["order"] == 1


def test_add_a_denoiser(followed):
    followed("Add a denoiser", denoisers.registry, "my_denoiser")
    network = denoisers.create("my_denoiser", in_channels=4)
    x = torch.randn(2, 4, 8, 8)
    assert network(x, torch.zeros(2)).shape == x.shape
    assert "my_denoiser" in denoisers.names()


def test_add_a_checkpoint_format(followed, tmp_path):
    followed("Add a denoiser", denoisers.registry, "my_denoiser")
    followed("Add a checkpoint format", None, "my_format")
    try:
        network = denoisers.create("my_denoiser", in_channels=4)
        tensors = {f"net.first.{end}": getattr(network.conv, end).data for end in ("weight", "bias")}
        found = checkpoints.from_state_dict(tensors)
        assert found.checkpoint_origin.format == "my_format"
        x = torch.randn(1, 4, 8, 8)
        assert torch.equal(found(x, torch.zeros(1)), network(x, torch.zeros(1)))
        with pytest.raises(KitError, match=r"1 missing \(net\.first\.bias\)"):
            checkpoints.from_state_dict({"net.first.weight": tensors["net.first.weight"]})
        checkpoints.save(found, tmp_path / "back.safetensors", layout="official")
        again = checkpoints.load(tmp_path / "back.safetensors")
        assert torch.equal(again.conv.weight, network.conv.weight)
    finally:
        del formats._formats["my_format"]

"""8-bit weights: each layer within the bound that its scales give, the right layers, plain errors."""

from __future__ import annotations

import sys

import pytest
import torch
from networks import inputs, make, relative
from torch import nn

from imagen_kit.errors import KitError
from imagen_kit.performance import quantising
from imagen_kit.performance.quantising import layers, quantise
from imagen_kit.performance.regions import blocks

UNTOUCHED = ("adaLN_modulation", "t_embedder", "x_embedder", "final_layer", "y_embedder")


class Net(nn.Module):
    """Two blocks of one linear layer."""

    def __init__(self, width=32):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(2))

    def repeated_blocks(self):
        return list(self.blocks)

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("kind", ["int8_weights", "int8"])
def test_a_layer_keeps_the_bound_of_its_scales(kind):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network, x = Net().requires_grad_(False), torch.randn(64, 32)
    weight, want = network.blocks[0][0].weight.clone(), network.blocks[0](x)
    assert quantise(network, kind, "cpu") == 2
    got = network.blocks[0](x)
    # a scale is max|w| / 127 and rounds by at most half of it; the last factor is float32's own rounding
    dw = (weight.abs().amax(1) / 254)[None] * 1.001
    bound = x.abs().sum(1, keepdim=True) * dw
    if kind == "int8":
        dx = x.abs().amax(1, keepdim=True) / 254 * 1.001
        bound = bound + dx * weight.abs().sum(1)[None] + 32 * dx * dw
    assert ((got - want).abs() <= bound + 1e-5).all()
    assert not torch.equal(got, want)


@pytest.mark.parametrize("kind", ["int8_weights", "int8"])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_networks_stay_close(name, kind):
    pytest.importorskip("torchao")
    network, fed = make(name), inputs(name)
    want = network(*fed)
    quantise(network, kind, "cpu")
    # Some 12 layers in a row, each off by about max|w|/254/√3 of spread at a maximum of 3 spreads: 0.7 %;
    # with activations rounded alike, √2 of that.
    assert 0 < relative(network(*fed), want) < 12**0.5 * 0.007 * 2


def test_only_layers_over_tokens_are_chosen():
    network = make("dit")
    chosen = {id(layer) for block in blocks(network) for layer in layers(block)}
    names = [key for key, part in network.named_modules() if id(part) in chosen]
    assert len(names) == 3 * 4
    assert not [key for key in names if any(word in key for word in UNTOUCHED)]
    assert all(key.startswith("blocks.") for key in names)
    ours = {k for block in blocks(make("unet")) for k, p in block.named_modules() if p in layers(block)}
    assert ours == {
        "attention.qkv",
        "attention.context",
        "attention.out",
        "attention.mlp.1",
        "attention.mlp.3",
    }


def test_widths_that_kernels_do_not_take_are_left():
    pytest.importorskip("torchao")
    with pytest.raises(
        KitError, match="Net has no linear layer in its blocks whose widths are multiples of 16"
    ):
        quantise(Net(24), "int8", "cpu")


def test_float8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(quantising, "find_spec", lambda name: object())
    line = "quantise fp8 needs a GPU of compute capability 8.9 or above, not cpu; choose int8"
    with pytest.raises(KitError) as error:
        quantise(Net(), "fp8", "cpu")
    assert str(error.value) == line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(KitError, match=r"8\.9 or above, not cuda:1"):
        quantise(Net(), "fp8", "cuda:1")


def test_torchao_is_an_extra(monkeypatch):
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    with pytest.raises(KitError) as error:
        quantise(Net(), "int8", "cpu")
    assert str(error.value) == "quantise int8 needs torchao; pip install 'imagen-kit[quant]'"


def test_a_torchao_that_does_not_import_is_told_plainly(monkeypatch):
    monkeypatch.setattr(quantising, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(KitError, match=r"quantise int8: the installed torchao cannot be imported \(.*\)$"):
        quantise(Net(), "int8", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["int8", "int8_weights", "fp8"])
def test_on_the_gpu(kind):
    pytest.importorskip("torchao")
    network, fed = make("dit"), inputs("dit", batch=8)
    want = network(*fed)
    network.to("cuda", torch.bfloat16)
    x, t, cond = fed
    on = x.to("cuda", torch.bfloat16), t.cuda(), cond.to("cuda", torch.bfloat16)
    try:
        quantise(network, kind, "cuda")
    except KitError as error:
        pytest.skip(str(error))
    # e4m3 keeps 4 bits: a rounding of 2^-4 at most, /√3 in the mean, over 12 layers
    bound = 12**0.5 * (2**-4 / 3**0.5 if kind == "fp8" else 0.014)
    assert relative(network(*on).float().cpu(), want) < bound

"""Packed weights: the same numbers up to rounding, the same state dicts, plain again wherever they must be."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from imagen_kit import codecs, denoisers
from imagen_kit.bench.counts import count, weight_bytes
from imagen_kit.bench.work import Work, random_inputs, randomised
from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.errors import KitError
from imagen_kit.performance import Performance, apply, apply_to_codec, choose, prepack, unpack
from imagen_kit.performance.prepacking import (
    PackedLinear,
    PackedLinearGelu,
    PackedWeight,
    packs,
)

pytestmark = pytest.mark.skipif(not packs(), reason="torch without oneDNN packs nothing")

# Both sums are of the same n products in float32: they differ by at most about n · 2⁻²⁴ of the sum of their sizes.
LAYERS = {
    "linear": (lambda: nn.Linear(256, 320), (2, 7, 256)),
    "without bias": (lambda: nn.Linear(512, 129, bias=False), (5, 512)),
    "one vector": (lambda: nn.Linear(300, 256), (300,)),
    "no rows": (lambda: nn.Linear(256, 256), (0, 256)),
    "gelu": (lambda: LinearGelu(256, 320), (2, 7, 256)),
    "gelu by tanh": (lambda: LinearGelu(256, 320, "tanh"), (2, 7, 256)),
}


def exact(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer in float64, and the sum of the sizes of what is added up in it."""
    wide = copy.deepcopy(layer).double()
    bare = copy.deepcopy(wide)
    for parameter in bare.parameters():
        parameter.data.abs_()
    bare.__class__ = nn.Linear if isinstance(bare, nn.Linear) else type(bare)
    return wide(x.double()), bare(x.double().abs())


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_packed_layer_gives_the_same_sums(name: str):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    wanted, sizes = exact(layer, x)
    plain = layer(x)
    assert prepack(layer) == 1
    assert isinstance(layer, (PackedLinear, PackedLinearGelu))
    got = layer(x)
    assert got.shape == plain.shape
    assert got.dtype == torch.float32
    # oneDNN's GELU is a polynomial that is off by up to about 1e-6 of its argument
    allowed = 512 * 2**-24 + 2e-6  # 512: the longest sum above
    assert bool(((got.double() - wanted).abs() <= allowed * sizes + 1e-7).all())


@pytest.mark.parametrize("turned", ["transposed", "strided", "expanded"])
@torch.no_grad()
def test_packed_products_take_any_strides(turned: str):
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    base = torch.randn(6, 5, 512)
    x = {
        "transposed": base[..., :256].transpose(0, 1),
        "strided": base[..., ::2],
        "expanded": base[:1, :1, :256].expand(4, 6, 256),
    }[turned]
    plain = layer(x)
    assert prepack(layer) == 1
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)  # 256 products in float32


@torch.no_grad()
def test_bfloat16_rounds_once_as_the_plain_layer_does():
    torch.manual_seed(0)
    layer, x = LinearGelu(64, 48, "tanh").bfloat16(), torch.randn(33, 64).bfloat16()
    wanted = layer.double()(x.double())
    layer.bfloat16()
    plain = (layer(x).double() - wanted).abs().max()
    assert prepack(layer) == 1
    assert layer(x).dtype == torch.bfloat16
    assert (layer(x).double() - wanted).abs().max() <= plain  # the sum goes into GELU unrounded


def network(name: str = "dit") -> nn.Module:
    wide = {"channels": 256, "blocks": 1, "attention": True}
    sizes = {
        "unet": {"levels": [{"channels": 32, "blocks": 1}, wide], "context_dim": 16},
        "uvit": {"width": 128, "depth": 2, "heads": 2, "num_classes": 5, "in_channels": 4},
        "dit": {"width": 128, "depth": 2, "heads": 2, "num_classes": 5, "in_channels": 4},
    }
    return randomised(denoisers.create(name, **sizes[name]), torch.device("cpu")).eval()


@pytest.mark.parametrize("name", ["dit", "uvit", "unet"])
@torch.no_grad()
def test_a_packed_network_answers_alike_and_is_plain_again(name: str):
    module = network(name)
    told = random_inputs(module, 2, 16, 7, torch.device("cpu"))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    answer = module(told.x, told.times, told.cond)
    applied = apply(module, Performance(prepack=True))
    kinds = {type(part) for part in module.modules()}
    assert applied.chosen.prepack
    assert "packed" in applied.words
    assert (PackedLinear if name == "unet" else PackedLinearGelu) in kinds
    packed = module(told.x, told.times, told.cond)
    # a few dozen layers, each of which rounds by some 1e-6 of its numbers
    torch.testing.assert_close(packed, answer, rtol=1e-4, atol=2e-5 * answer.abs().max().item())
    held = module.state_dict()
    assert held.keys() == before.keys()
    assert all(type(value) is torch.Tensor and value.equal(before[key]) for key, value in held.items())
    unpack(module)
    assert not {type(part) for part in module.modules()} & {PackedLinear, PackedLinearGelu}
    assert all(value.equal(before[key]) for key, value in module.state_dict().items())
    apply(module, Performance(prepack=True))
    apply(module, Performance())
    torch.testing.assert_close(module(told.x, told.times, told.cond), answer, rtol=0, atol=0)


@torch.no_grad()
def test_state_is_saved_loaded_copied_and_moved_as_ever():
    torch.manual_seed(0)
    layer, other, x = nn.Linear(256, 256), nn.Linear(256, 256), torch.randn(3, 256)
    prepack(layer)
    twin = copy.deepcopy(layer)
    assert twin(x).equal(layer(x))
    assert twin.bias is not layer.bias
    layer.load_state_dict(other.state_dict())
    assert isinstance(layer, PackedLinear)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-6)
    assert not twin(x).equal(layer(x))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True)["weight"].equal(other.weight)
    assert isinstance(layer.to("cpu").float(), PackedLinear)
    assert type(layer.double()) is nn.Linear
    assert layer.weight.dtype == torch.float64
    assert layer(x.double()).equal(other.double()(x.double()))
    with pytest.raises(KitError, match="state_dict"):
        torch.save(twin, io.BytesIO())


def test_derivatives_are_those_of_the_plain_layer():
    torch.manual_seed(0)
    for make, shape in (LAYERS["linear"], LAYERS["gelu by tanh"]):
        layer = make()
        x = torch.randn(shape, requires_grad=True)
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
        prepack(layer)
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert got.equal(wanted)


def test_what_cannot_be_packed_is_left():
    class Other(nn.Linear):
        pass

    parts = [
        nn.Linear(255, 256),  # of float32, too small to gain
        nn.Linear(256, 256).double(),
        nn.Linear(256, 256).half(),
        nn.Linear(256, 256, device="meta"),
        nn.utils.parametrizations.weight_norm(nn.Linear(256, 256)),
        Other(256, 256),
        nn.Conv2d(256, 256, 3),
        nn.Embedding(256, 256),
    ]
    assert prepack(nn.ModuleList(parts)) == 0
    assert prepack(nn.ModuleList([nn.Linear(256, 256), nn.Linear(4, 4).bfloat16()])) == 2


def test_counts_of_packed_layers_are_those_of_plain_ones():
    made = nn.Sequential(nn.Linear(256, 256), LinearGelu(256, 384)).eval()
    x = torch.randn(2, 5, 256)
    work = Work(lambda: None, "calls", 1, modules=[made])
    with torch.no_grad():
        plain, held = count(lambda: made(x)), weight_bytes(work)
        assert prepack(made) == 2
        packed = count(lambda: made(x))
    assert packed.flops == plain.flops == 2 * 10 * 256 * (256 + 384)
    assert packed.bytes <= plain.bytes  # by the GELU, which is no operation of its own any more
    assert weight_bytes(work) == held


def test_auto_packs_on_a_cpu_unless_compiled_or_quantised():
    dit, unet = network(), network("unet")
    auto = Performance(dtype="auto")
    chosen = choose(dit, auto, "cpu")
    assert chosen.prepack
    assert chosen.codec_dtype == "fp32"
    for other in ({"compile": "blocks"}, {"quantise": "int8"}, {"prepack": False}):
        assert choose(unet, Performance(dtype="auto", **other), "cpu").prepack is None
    assert choose(unet, Performance(), "cpu").prepack is None
    assert choose(unet, Performance(prepack=True), "meta").prepack is None
    with pytest.raises(KitError, match="choose one"):
        Performance(prepack=True, compile="whole")
    with pytest.raises(KitError, match="prepack must be true or false"):
        Performance(prepack=1)


@torch.no_grad()
def test_a_codec_follows_the_stage():
    torch.manual_seed(0)
    codec = codecs.create("kl", widths=[32, 64], blocks=1)
    latents = torch.randn(2, 4, 8, 8)
    plain = codec.decode(latents)
    apply_to_codec(codec, Performance(codec_dtype="bf16"), "cpu")
    low = codec.decode(latents)
    assert low.dtype == torch.bfloat16
    assert codec.encode(low.float()).dtype == torch.bfloat16
    # eight bits of a number, some twenty layers
    assert (low.float() - plain).square().mean() <= 0.02**2 * plain.square().mean()


def test_a_packed_weight_is_a_parameter_that_says_what_it_is():
    layer = nn.Linear(512, 256)
    prepack(layer)
    assert isinstance(layer.weight, PackedWeight)
    assert layer.weight.shape == (256, 512)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float32, "cpu")
    assert sum(p.numel() for p in layer.parameters()) == 256 * 513
    assert not layer.bias.requires_grad

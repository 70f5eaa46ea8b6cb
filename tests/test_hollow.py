"""Modules made without memory or without values, and nothing else changed by it."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from imagen_kit import denoisers
from imagen_kit.hollow import TooLarge, hollow, hollow_parameters, is_hollow, sketched, undrawn
from imagen_kit.recipe import loading
from imagen_kit.weights import save_safetensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.words = nn.Linear(3, 4), nn.Conv2d(2, 2, 3), nn.Embedding(5, 6)
        self.free = nn.Parameter(torch.randn(3))
        nn.init.trunc_normal_(self.linear.weight)
        nn.init.xavier_uniform_(self.conv.weight)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("noise", torch.randn(4), persistent=False)


def test_hollow_is_all_meta_but_for_what_names_its_device():
    assert not is_hollow()
    with hollow():
        assert is_hollow()
        net, here = Net(), torch.randn(3, device="cpu")
    assert not is_hollow()
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert here.std() > 0
    plain = Net()
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_hollow_parameters_keep_buffers_with_their_values():
    torch.manual_seed(0)
    with hollow_parameters():
        assert is_hollow()
        net = Net()
    assert not is_hollow()
    assert all(p.is_meta for p in net.parameters())
    assert torch.equal(net.table, torch.arange(4.0))
    assert net.noise.std() > 0
    assert all(not p.is_meta for p in Net().parameters())  # the hook is gone
    with pytest.raises(ValueError, match="x"), hollow_parameters():
        raise ValueError("x")
    assert not is_hollow()


def test_undrawn_leaves_the_generator_alone_where_only_parameters_would_draw():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with undrawn():
        nn.Linear(30, 40)
        nn.Embedding(5, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    with undrawn():
        net = Net()
    assert net.noise.std() > 0  # a buffer in no file keeps its values
    assert all(not p.is_meta for p in net.parameters())


def test_sketched_is_on_the_cpu_up_to_its_limit():
    small, large = sketched(Net, 1000), sketched(Net, 40)
    assert {p.device.type for p in small.parameters()} == {"cpu"}
    assert {p.device.type for p in large.parameters()} == {"meta"}
    with pytest.raises(TooLarge), undrawn(40):
        Net()


@pytest.mark.parametrize("channels_last", [False, True])
def test_own_files_fill_small_and_large_networks_alike(tmp_path, monkeypatch, channels_last):
    """Large ones leave their weights in the file, mapped, and answer the same bit for bit."""
    options = {
        "levels": [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": True}],
        "runtime": {"channels_last": channels_last},
    }
    torch.manual_seed(0)
    plain = denoisers.create("unet", **options).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    path = save_safetensors(tmp_path / "a.safetensors", plain.state_dict())
    load = partial(loading.load_network, "denoiser", denoisers.registry, "unet", options, path)
    copied = load().eval()
    monkeypatch.setattr(loading, "sketched", partial(sketched, limit=0))
    mapped = load().eval()
    x, t = torch.randn(2, plain.inputs.in_channels, 8, 8), torch.tensor([0.2, 0.9])
    from imagen_kit.conditioning import Cond

    with torch.no_grad():
        expected = plain(x, t, Cond())
        assert torch.equal(copied(x, t, Cond()), expected)
        assert torch.equal(mapped(x, t, Cond()), expected)
    for network in (copied, mapped):
        for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
            assert (p.requires_grad, p.stride()) == (q.requires_grad, q.stride()), name
    mapped.train()(x, t, Cond()).square().mean().backward()  # and may be trained
    assert all(p.grad is not None for p in mapped.parameters())
    before = path.read_bytes()
    torch.optim.SGD(mapped.parameters(), lr=1.0).step()
    assert path.read_bytes() == before


def test_building_without_values_does_not_import_the_compiler():
    code = """
import sys, torch
before = set(sys.modules)
from torch import nn
from imagen_kit.hollow import hollow, hollow_parameters, undrawn
for block in (hollow, hollow_parameters, undrawn):
    with block():
        nn.Linear(3, 4), nn.Conv2d(2, 2, 3), nn.Embedding(5, 6), nn.Parameter(torch.randn(3))
        nn.init.trunc_normal_(nn.Linear(3, 4).weight)
print(*(set(sys.modules) - before) & {"torch._dynamo", "sympy", "torch._inductor"})
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []

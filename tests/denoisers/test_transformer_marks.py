"""Guidance finds the layers of the transformers over text and picture, and what it changes is what they say."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.guidance.layers import Change

SMALL = {"width": 32, "depth": 2, "heads": 2, "context_dim": 5}
# name, options, attention layers, blocks that can be left out
NETWORKS = {
    "mmdit": ({"details": {"grid": 6, "dual_layers": [0]}}, 3, 2),
    "flux": ({"single_depth": 1}, 3, 3),
    "pixart": ({}, 2, 2),
    "uvit": ({"details": {"grid": 6}}, 3, 2),
}
every = pytest.mark.parametrize("name", NETWORKS)


def built(name):
    g = torch.Generator().manual_seed(0)
    network = denoisers.create(name, **SMALL, **NETWORKS[name][0]).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return network, (
        torch.randn(2, 3, 8, 8, generator=g),
        torch.ones(2),
        Cond(tokens=torch.randn(2, 4, 5, generator=g)),
    )


@every
@pytest.mark.parametrize("kind", ["attention", "block"])
@torch.no_grad()
def test_each_layer_can_be_changed(name, kind):
    network, call = built(name)
    count = NETWORKS[name][1 if kind == "attention" else 2]
    want, outs = network(*call), []
    for layer in range(count):
        change = Change("guidance", kind, (layer,))
        out = change(network)(*call)
        assert not torch.allclose(out, want, atol=1e-4), layer
        only_second = change.rows(network, slice(1, 2))(*call)
        torch.testing.assert_close(only_second, torch.stack([want[0], out[1]]), atol=1e-5, rtol=1e-5)
        outs.append(out)
    assert len(Change("guidance", kind, ("*",)).choose(network)) == count
    assert torch.equal(network(*call), want)


@torch.no_grad()
def test_own_values_shut_the_text_out():
    """Where every attention answers with a token's own value, patches hear neither each other nor the text."""
    for name in ("mmdit", "flux", "uvit"):
        network, (x, t, cond) = built(name)
        alone = Change("guidance", "attention", ("*",))(network)
        torch.testing.assert_close(alone(x, t, Cond(tokens=-cond.tokens)), alone(x, t, cond))
        assert not torch.allclose(network(x, t, Cond(tokens=-cond.tokens)), network(x, t, cond), atol=1e-3)

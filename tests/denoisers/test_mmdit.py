"""MMDiT: the published sizes, its table of positions, and what the text streams may not do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.joint import from_patches, to_patches
from imagen_kit.denoisers.layers.transformer import sincos_positions
from imagen_kit.denoisers.mmdit import MMDiT
from imagen_kit.errors import KitError

TINY = {"width": 32, "depth": 2, "heads": 2, "context_dim": 5, "pooled_dim": 3, "details": {"grid": 6}}


@pytest.mark.parametrize(
    # elements of the published files; the table of positions is counted by itself
    ("size", "elements", "grid"),
    [
        ("sd3_medium", 2_084_951_104, 192),
        ("sd35_medium", 2_469_663_936, 384),
        ("sd35_large", 8_146_280_768, 192),
    ],
)
def test_published_sizes(size, elements, grid):
    with torch.device("meta"):
        network = denoisers.create(size)
    assert network.grid == grid
    assert sum(v.numel() for v in network.state_dict().values()) == elements
    facts = denoisers.describe(size)["sampling"]
    assert facts["schedule"] == {"name": "flow", "shift": 3.0}
    assert facts["prediction"] == "flow"


def test_cost_of_sd3_medium():
    """Products of the weights with n = 64² patches and m = 154 text tokens, and joint attention: 4·d·(m + n)²."""
    with torch.device("meta"):
        network = denoisers.create("sd3_medium")
        cond = Cond(tokens=torch.empty(1, 154, 4096), pooled=torch.empty(1, 2048))
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            network(torch.empty(1, 16, 128, 128), torch.empty(1), cond)
    d, depth, n, m = 1536, 24, 64**2, 154
    # a token passes 4 d² of attention and 8 d² of MLP, the last block's text only its 3 d² of q, k and v
    weights = depth * 12 * d**2 * n + ((depth - 1) * 12 + 3) * d**2 * m
    ends = n * (64 * d + d * 64) + m * 4096 * d
    vectors = (256 + d + 2048 + d) * d + ((depth - 1) * 12 + 6 + 2 + 2) * d**2
    assert flops.get_total_flops() == 2 * (weights + ends + vectors) + depth * 4 * d * (m + n) ** 2


def test_positions_are_the_centre_of_the_table():
    network = MMDiT(**TINY)
    table = sincos_positions(6, 6, 32).view(6, 6, 32)
    assert torch.equal(network._positions(2, 3), table[2:4, 1:4].reshape(1, 6, 32))
    assert torch.equal(network._positions(6, 6), table.reshape(1, 36, 32))
    with pytest.raises(KitError, match="picture of 7×2 patches: this mmdit has positions for sides up to 12"):
        network._positions(7, 2)


def test_without_pooled_text():
    network = MMDiT(**{**TINY, "pooled_dim": None})
    assert network.y_embedder is None
    out = network(torch.randn(1, 3, 4, 8), torch.ones(1), Cond(tokens=torch.randn(1, 2, 5)))
    assert out.shape == (1, 3, 4, 8)


def test_the_order_of_text_tokens_does_not_matter():
    """Text has no positions here (its encoders gave it some), so a joint attention cannot tell the order."""
    network = MMDiT(**TINY).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
        x, tokens, pooled = (torch.randn(*s, generator=g) for s in ((1, 3, 8, 8), (1, 4, 5), (1, 3)))
        want = network(x, torch.ones(1), Cond(tokens=tokens, pooled=pooled))
        got = network(x, torch.ones(1), Cond(tokens=tokens.flip(1), pooled=pooled))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(
            network(x.flip(2), torch.ones(1), Cond(tokens=tokens, pooled=pooled)).flip(2), want
        )


def test_patches_there_and_back():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    packed = to_patches(x, 2)
    assert torch.equal(packed[0, 1], x[0, :, 0:2, 2:4].flatten())
    assert torch.equal(from_patches(packed, 2, 3, 2, channels_first=True), x)
    channels_last = packed.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(from_patches(channels_last, 2, 3, 2), x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "width 32 must be a multiple of heads (5)"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"width": 6, "heads": 1}, "multiple of 4"),
        ({"details": {"qk_nrm": True}}, "did you mean 'qk_norm'"),
        ({"details": {"dual_layers": [2]}}, "between 0 and 1"),
        ({"runtime": {"checkpoint": True}}, "checkpointing"),
    ],
)
def test_faults_are_named(change, said):
    with pytest.raises(KitError) as error:
        MMDiT(**{**TINY, **change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)

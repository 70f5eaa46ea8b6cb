"""FLUX: the published sizes, its rotary positions, and guidance as an input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.flux import Flux
from imagen_kit.denoisers.layers.rope import default_widths, picture_places, rotate, rotation
from imagen_kit.errors import KitError

TINY = {"width": 32, "depth": 1, "single_depth": 1, "heads": 2, "context_dim": 5, "pooled_dim": 3}


def shaken(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return network.eval()


@pytest.mark.parametrize(
    # elements of the published file of dev; schnell lacks the embedding of its guidance
    ("size", "elements"),
    [("flux_dev", 11_901_408_320), ("flux_schnell", 11_901_408_320 - (256 + 1 + 3072 + 1) * 3072)],
)
def test_published_sizes(size, elements):
    with torch.device("meta"):
        network = denoisers.create(size)
    assert sum(p.numel() for p in network.parameters()) == elements
    assert network.axes == [16, 56, 56]
    assert denoisers.describe(size)["sampling"]["prediction"] == "flow"


def test_cost_of_a_step():
    """74.5 TFLOP at 1024² with 512 tokens, as flux-fast's 50 steps count 3726.87."""
    with torch.device("meta"):
        network = denoisers.create("flux_dev")
        cond = Cond(tokens=torch.empty(1, 512, 4096), pooled=torch.empty(1, 768), guidance=torch.empty(1))
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            network(torch.empty(1, 16, 128, 128), torch.empty(1), cond)
    # matrix products only
    assert flops.get_total_flops() / 1e12 == pytest.approx(74.5, rel=3e-3)


def test_rotation_is_complex_multiplication():
    g = torch.Generator().manual_seed(0)
    places = torch.rand(5, 3, generator=g) * 9
    x = torch.randn(2, 3, 5, 12, generator=g, dtype=torch.float64).float()
    got = rotate(x, rotation(places, [2, 4, 6], theta=100.0))
    z = torch.view_as_complex(x.double().unflatten(-1, (6, 2)))
    pair = 0
    for axis, width in enumerate((2, 4, 6)):
        for i in range(width // 2):
            angle = places[:, axis].double() * 100.0 ** (-2 * i / width)
            z[..., pair] *= torch.exp(1j * angle)
            pair += 1
    want = torch.view_as_real(z).flatten(-2).float()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # float32 angles up to 9
    assert rotate(x.bfloat16(), rotation(places, [2, 4, 6])).dtype == torch.bfloat16


def test_places():
    places = picture_places(2, 2, 3)
    assert places.tolist() == [[0, 0, 0]] * 2 + [[0, r, c] for r in range(2) for c in range(3)]


def test_logits_depend_on_distance_alone():
    turn = rotation(picture_places(0, 4, 4), default_widths(16))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 16, 16)
    logits = (rotate(q, turn) @ rotate(k, turn).transpose(-1, -2))[0, 0].view(4, 4, 4, 4)
    torch.testing.assert_close(logits[0, 0, 1, 2], logits[2, 1, 3, 3], atol=1e-5, rtol=0)
    assert not math.isclose(logits[0, 0, 1, 2], logits[1, 2, 0, 0], abs_tol=1e-3)


@pytest.mark.parametrize(
    ("head", "axes"), [(128, [16, 56, 56]), (16, [4, 6, 6]), (64, [8, 28, 28]), (4, [0, 2, 2])]
)
def test_default_axes(head, axes):
    assert default_widths(head) == axes
    assert sum(axes) == head


def test_guidance_is_an_input():
    network = shaken(Flux(**TINY, guidance=True))
    x, t = torch.randn(2, 3, 4, 6), torch.tensor([3.0, 700.0])
    cond = {"tokens": torch.randn(2, 4, 5), "pooled": torch.randn(2, 3)}
    with torch.no_grad():
        weak, strong = (network(x, t, Cond(**cond, guidance=torch.full((2,), s))) for s in (1.0, 3.5))
    assert (weak - strong).abs().max() > 1e-2
    with pytest.raises(KitError, match=r"cond\.guidance"):
        network(x, t, Cond(**cond))


def test_without_single_blocks_or_pooled_text():
    network = shaken(Flux(**{**TINY, "single_depth": 0, "pooled_dim": None}))
    with torch.no_grad():
        out = network(torch.randn(1, 3, 4, 8), torch.ones(1), Cond(tokens=torch.randn(1, 2, 5)))
    assert out.shape == (1, 3, 4, 8)
    assert out.std() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "width 32 must be a multiple of heads (5)"),
        ({"single_depth": -1}, "single_depth must be at least 0, not -1"),
        ({"details": {"axes": [4, 6, 4]}}, "make up a head (16)"),
        ({"details": {"axes": [2, 7, 7]}}, "three even numbers"),
        ({"details": {"tetha": 1}}, "did you mean 'theta'"),
        ({"runtime": {"checkpoint": True}}, "checkpointing"),
    ],
)
def test_faults_are_named(change, said):
    with pytest.raises(KitError) as error:
        Flux(**{**TINY, **change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)

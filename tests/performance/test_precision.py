"""Lower precision: within its rounding of float32, better by its edges, and undone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import OPTIONS, inputs, make, relative
from torch import nn

from imagen_kit.performance.precision import FIRST, LAST, computing_dtype, lower, picture_dtype

HALF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # largest relative error of one rounding


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIONS)
def test_within_the_rounding_of_the_dtype(name, dtype):
    network, (x, t, cond) = make(name), inputs(name)
    want = network(x, t, cond)
    lower(network, dtype)
    got = network(x, t, cond.to(dtype=dtype))
    assert got.dtype == torch.float32
    # Some 30 roundings in a row of a random sign each, of which every one is at most the half unit above.
    assert relative(got, want) < 30**0.5 * HALF[dtype] * 1.5
    assert relative(got, want) > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_edges_in_float32_are_worth_it(name):
    """Against rounding everything, over several pictures."""
    plain, edged, want = make(name).bfloat16(), make(name), make(name)
    lower(edged, torch.bfloat16)
    errors = torch.zeros(2)
    for seed in range(8):
        x, t, cond = inputs(name, seed=seed)
        rounded, truth = cond.to(dtype=torch.bfloat16), want(x, t, cond)
        errors[0] += relative(plain(x.bfloat16(), t, rounded), truth)
        errors[1] += relative(edged(x, t, rounded), truth)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_edges_keep_their_weights_and_the_rest_is_rounded_once(name):
    network, original = make(name), make(name)
    lower(network, torch.bfloat16)
    edges = 0
    for key, value in original.named_parameters():
        own = network.get_parameter(key)
        if key.split(".")[0] in FIRST + LAST:
            assert torch.equal(own, value)
            edges += 1
        else:
            assert torch.equal(own, value.bfloat16())
    assert edges >= 3
    assert computing_dtype(network) == torch.bfloat16
    assert picture_dtype(network) == torch.float32


def test_float32_undoes_it():
    network, (x, t, cond) = make("unet").bfloat16().float(), inputs("unet")
    want = network(x, t, cond)
    lower(network, torch.bfloat16)
    lower(network, torch.bfloat16)
    lower(network, torch.float32)
    assert torch.equal(network(x, t, cond), want)  # its weights were bfloat16 numbers
    assert computing_dtype(network) == picture_dtype(network) == torch.float32
    assert not [part for part in network.modules() if part._forward_hooks or part._forward_pre_hooks]


def test_a_copy_is_a_network_of_its_own():
    network, (x, t, cond) = make("dit"), inputs("dit")
    lower(network, torch.bfloat16)
    twin = copy.deepcopy(network)
    want = network(x, t, cond)
    assert torch.equal(twin(x, t, cond), want)
    lower(network, torch.float32)
    assert torch.equal(twin(x, t, cond), want)


def test_networks_without_known_edges_are_fed_in_their_dtype():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            assert t.dtype == torch.float32
            return self.conv(x)

    network = Plain()
    lower(network, torch.bfloat16)
    assert network(torch.ones(1, 3, 4, 4), torch.ones(1)).dtype == torch.bfloat16


def test_a_network_in_one_dtype_is_fed_with_it():
    network = make("dit").bfloat16()
    assert picture_dtype(network) == computing_dtype(network) == torch.bfloat16

"""Channels last: the same numbers, and every convolution really sees it."""

from __future__ import annotations

import pytest
import torch
from networks import OPTIONS, inputs, make
from torch import nn

from imagen_kit.performance.layout import convolves, lay_out


def seen(network, name):
    """Whether each convolution over a picture of several cells was given channels last."""
    flags = []
    handles = [
        part.register_forward_pre_hook(
            lambda _, args: flags.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        for part in network.modules()
        if isinstance(part, nn.Conv2d)
    ]
    answer = network(*inputs(name))
    for handle in handles:
        handle.remove()
    return answer, flags


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back(name):
    network = make(name)
    want = network(*inputs(name))
    lay_out(network, "channels_last")
    got, flags = seen(network, name)
    # float32, convolutions summed in another order: some 1e-6 of the spread
    torch.testing.assert_close(got, want, atol=2e-5 * float(want.std()), rtol=0)
    if name in ("unet", "adm"):
        assert sum(flags) > 0.9 * len(
            flags
        )  # attention gives back a picture that is contiguous in another way
    lay_out(network, "contiguous")
    assert torch.equal(network(*inputs(name)), want)
    assert not network._forward_pre_hooks


def test_which_networks_convolve():
    assert {name for name in OPTIONS if convolves(make(name))} == {"unet", "adm", "uvit"}


def test_a_network_without_a_switch_is_given_a_turned_picture():
    network = nn.Sequential(nn.Conv2d(4, 4, 3))
    x, layouts = torch.randn(2, 4, 8, 8), []
    want = network(x)
    lay_out(network, "channels_last")
    network[0].register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride(1)))
    torch.testing.assert_close(network(x), want)
    assert layouts == [1]
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)

from __future__ import annotations

import copy

import pytest
import torch
from guided_networks import FLOW
from layered_networks import inputs, network

from imagen_kit import denoise_fn, guidance, samplers
from imagen_kit.errors import KitError

T = 0.5


class Nothing(torch.nn.Module):
    def forward(self, x, *others):
        return x


def without(name: str, *paths: str) -> torch.nn.Module:
    module = copy.deepcopy(network(name))
    for path in paths:
        holder, _, last = path.rpartition(".")
        setattr(module.get_submodule(holder), last, Nothing())
    return module


@pytest.mark.parametrize("execution", ["batched", "split"])
@pytest.mark.parametrize(
    ("name", "layers", "gone"),
    [
        ("dit", [0, "blocks.2"], ["blocks.0", "blocks.2"]),
        ("unet", "middle.attention", ["middle.attention"]),
        ("unet", ["middle.res", "up.*.attention"], ["middle.res", "up.0.0.attention", "up.0.1.attention"]),
    ],
)
@torch.no_grad()
def test_it_is_led_away_from_the_network_without_the_blocks(execution, name, layers, gone):
    x, cond, _ = inputs()
    net, t = network(name), torch.full((2,), T)
    strategy = guidance.create("slg", layers=layers, scale=2.5)
    got = denoise_fn(net, FLOW, "x0", cond=cond, guidance=strategy, execution=execution)(x, T)
    told, less = net(x, t, cond), without(name, *gone)(x, t, cond)
    assert (told - less).abs().max() > 1e-3
    # float64, but times and positions are float32 inside the networks, the same for both
    assert torch.allclose(got, told + 2.5 * (told - less), atol=1e-9)


@torch.no_grad()
def test_scale_0_is_nothing():
    x, cond, _ = inputs()
    net = network("dit")
    none = guidance.create("slg", layers=0, scale=0.0)
    assert torch.equal(
        denoise_fn(net, FLOW, cond=cond, guidance=none)(x, T), denoise_fn(net, FLOW, cond=cond)(x, T)
    )


@torch.no_grad()
def test_in_a_part_of_the_steps_as_stable_diffusion_3_5_does():
    x, cond, uncond = inputs()
    net, sizes = network("dit"), []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    skip = {"name": "slg", "layers": [1]}
    early = guidance.create("interval", of=skip, low=0.01, high=0.2, by="progress")
    denoise = denoise_fn(net, FLOW, "flow", cond=cond, uncond=uncond, guidance=[4.0, early])
    samplers.create("euler").sample(denoise, x, FLOW, 10)
    assert sizes == [4, 6, 6, *[4] * 7]


def test_blocks_that_change_the_shape_are_no_choice():
    _, cond, _ = inputs()
    with pytest.raises(KitError, match=r"unknown block layer 'up.0.0.res'; did you mean"):
        denoise_fn(network("unet"), FLOW, cond=cond, guidance=guidance.create("slg", layers="up.0.0.res"))
    with pytest.raises(KitError, match="slg layers must be a list"):
        guidance.create("slg", layers=[])

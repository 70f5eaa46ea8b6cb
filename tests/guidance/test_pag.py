from __future__ import annotations

import copy
import threading

import pytest
import torch
from guided_networks import FLOW, Counter
from layered_networks import inputs, network

from imagen_kit import attention, denoise_fn, guidance
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture
from imagen_kit.errors import KitError

T = 0.5
LAYERS = {"unet": "middle", "dit": "blocks.1"}


def with_own_values(name: str) -> torch.nn.Module:
    """The network, the forward of one layer written anew: every cell is answered with its own value."""
    module = copy.deepcopy(network(name))
    if name == "dit":
        layer = module.blocks[1].attn
        layer.forward = lambda x: layer.proj(layer.qkv(x).chunk(3, -1)[2])
        return module
    block = module.middle.attention

    def forward(x, context=None, mask=None):
        h, w = x.shape[-2:]
        cells = to_cells(x)
        _, _, v = split_heads(block.qkv(to_cells(block.norm(x)) + block.places(h, w)), 3, block.head_dim)
        cells = cells + block.out(join_heads(v))
        return to_picture(cells + block.mlp(cells), h, w)

    block.forward = forward
    return module


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("execution", ["batched", "split"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_chosen_maps_are_the_identity(name, execution, backend):
    x, cond, uncond = inputs()
    stack = [2.0, guidance.create("pag", layers=LAYERS[name], scale=3.0)]
    net = network(name)
    denoise = denoise_fn(net, FLOW, "x0", cond=cond, uncond=uncond, guidance=stack, execution=execution)
    with attention.use_backend(backend):
        got = denoise(x, T)
        t = torch.full((2,), T)
        told, free, perturbed = net(x, t, cond), net(x, t, uncond), with_own_values(name)(x, t, cond)
    assert (told - perturbed).abs().max() > 1e-3
    # float64, but times and positions are float32 inside the networks, the same for both
    assert torch.allclose(got, 2 * told - free + 3 * (told - perturbed), atol=1e-9)


@torch.no_grad()
def test_one_call_or_one_a_branch():
    x, cond, uncond = inputs()
    net, sizes = network("dit"), []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for execution in ("batched", "split"):
        stack = [2.0, guidance.create("pag", layers=1), guidance.create("slg", layers=[0, -1])]
        denoise_fn(net, FLOW, cond=cond, uncond=uncond, guidance=stack, execution=execution)(x, T)
    assert sizes == [8, 2, 2, 2, 2]


@torch.no_grad()
def test_scale_0_is_nothing_and_the_network_stays_as_it_was():
    x, cond, _ = inputs()
    net = network("unet")
    plain = denoise_fn(net, FLOW, cond=cond)
    before = plain(x, T)
    assert torch.equal(
        denoise_fn(net, FLOW, cond=cond, guidance=guidance.create("pag", layers=0, scale=0.0))(x, T), before
    )
    denoise_fn(net, FLOW, cond=cond, guidance=guidance.create("pag", layers=0))(x, T)
    assert torch.equal(plain(x, T), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@torch.no_grad()
def test_names_patterns_and_places():
    x, cond, _ = inputs()
    for name, same in (
        ("unet", ["middle.attention", "middle", "m*", 1]),
        ("dit", ["blocks.2.attn", "blocks.2", 2, -1]),
    ):
        net = network(name)
        results = [
            denoise_fn(net, FLOW, cond=cond, guidance=guidance.create("pag", layers=layer))(x, T)
            for layer in same
        ]
        assert all(torch.equal(result, results[0]) for result in results)
    every = [
        denoise_fn(net, FLOW, cond=cond, guidance=guidance.create("pag", layers=c))(x, T)
        for c in ("blocks", [0, 1, 2])
    ]
    assert torch.equal(*every)
    assert not torch.equal(every[0], results[0])


@torch.no_grad()
def test_another_thread_sees_the_network_unchanged():
    x, cond, _ = inputs()
    net, during = network("unet"), []
    plain = net(x, torch.full((2,), T), cond)

    def look(module, args, output):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: during.append(net(x, torch.full((2,), T), cond)))
            other.start()
            other.join(60)

    net.middle.attention.qkv.register_forward_hook(look)  # in the midst of the perturbed layer
    denoise_fn(net, FLOW, cond=cond, guidance=guidance.create("pag", layers="middle"), execution="split")(
        x, T
    )
    assert len(during) == 2
    assert all(torch.equal(seen, plain) for seen in during)


def test_what_cannot_be_changed_is_said():
    _, cond, _ = inputs()
    with pytest.raises(KitError, match=r"unknown attention layer 'block.1'; did you mean 'blocks.1'"):
        denoise_fn(network("dit"), FLOW, cond=cond, guidance=guidance.create("pag", layers="block.1"))
    with pytest.raises(KitError, match=r"no layer 3; DiT has 3, 0 \(blocks.0.attn\) to 2 \(blocks.2.attn\)"):
        denoise_fn(network("dit"), FLOW, cond=cond, guidance=guidance.create("pag", layers=[0, 3]))
    with pytest.raises(KitError, match="Linear has no layer marked is_self_attention = True"):
        denoise_fn(torch.nn.Linear(1, 1), FLOW, guidance=guidance.create("pag", layers=0))
    with pytest.raises(KitError, match="must be a torch module"):
        denoise_fn(Counter(), FLOW, guidance=guidance.create("pag", layers=0))


def test_a_layer_that_computes_attention_in_another_way_is_refused():
    class Own(torch.nn.Module):
        is_self_attention = True

        def forward(self, x):
            return x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Own()

        def forward(self, x, t):
            return self.own(x)

    denoise = denoise_fn(Net(), FLOW, "x0", guidance=guidance.create("pag", layers="own"))
    with pytest.raises(KitError, match="pag: layer 'own' could not be changed"):
        denoise(torch.randn(1, 3, 4, 4), T)


@pytest.mark.parametrize("layers", [[], "", None, [1.5], [True], {"a": 1}], ids=str)
def test_bad_layers_are_refused(layers):
    with pytest.raises(KitError, match="pag layers must be a list"):
        guidance.create("pag", layers=layers)


def test_bad_scales_are_refused():
    with pytest.raises(KitError, match="pag scale must be a number"):
        guidance.create("pag", layers=0, scale="3")

"""What a network makes of its text once a run: the same answers, and the text read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagen_kit import denoise_fn, denoisers, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.context import readers
from imagen_kit.errors import KitError

FLOW = schedules.create("flow")
UNET = {"levels": [{"channels": 32}, {"channels": 32, "blocks": 1, "attention": True}], "head_dim": 8}
GROUPS = {"resample": "residual", "groups": 8}
TEXT = {"context_dim": 12}
POOLED = {**TEXT, "pooled_dim": 6}


def plain(**attention: Any) -> dict[str, Any]:
    return {"levels": [{"channels": 32, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": attention}]}


def transformer(**attention: Any) -> dict[str, Any]:
    return {**plain(kind="transformer", heads=2, **attention), "style": {"groups": 8, "modulation": "shift"}}


#: name: (registered network, its options, tensors that it keeps for itself)
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "unet": ("unet", {**UNET, **POOLED, "text_depth": 1}, 1),
    "unet with labels": ("unet", {**UNET, **TEXT, "num_classes": 3, "low_res_channels": 3}, 1),
    "adm, joined": ("adm", {**plain(heads=2), **TEXT, "style": GROUPS}, 0),
    "adm, text alone": ("adm", {**plain(heads=2, cells=False), **TEXT, "style": GROUPS}, 0),
    "adm of IF": (
        "adm",
        {**plain(heads=2), **TEXT, "style": GROUPS, "embedding": {"text_width": 32, "text_heads": 2}},
        1,
    ),
    "adm of Stable Diffusion": ("adm", {**transformer(depth=2), **TEXT}, 0),
    "adm of the upscaler": ("adm", {**transformer(cells=False), **TEXT}, 0),
    "adm of SDXL": (
        "adm",
        {**transformer(depth=2), **POOLED, "embedding": {"size_numbers": 2, "size_width": 8}},
        1,
    ),
    "efficient_unet": (
        "efficient_unet",
        {
            "levels": [{"channels": 32, "blocks": 2, "attention": {"heads": 2, "cells": False}}] * 2,
            **TEXT,
        },
        1,
    ),
    "timm_unet": (
        "timm_unet",
        {
            "backbone": {"name": "convnext_atto"},
            "decoder": {"width": 8, "widest": 32, "head_dim": 8},
            **TEXT,
        },
        1,
    ),
    "dit": ("dit", {"width": 32, "depth": 2, "heads": 2, **POOLED, "text_depth": 1}, 1),
    "pixart": ("pixart", {"width": 24, "depth": 2, "heads": 2, "sizes": True, "null_tokens": 4, **TEXT}, 1),
    "mmdit": ("mmdit", {"width": 32, "depth": 2, "heads": 2, "details": {"grid": 8}, **POOLED}, 2),
    "flux": (
        "flux",
        {"width": 32, "depth": 1, "single_depth": 1, "heads": 2, "guidance": True, **POOLED},
        3,
    ),
    "uvit": ("uvit", {"width": 32, "depth": 2, "heads": 2, "details": {"grid": 4}, **TEXT}, 1),
}
ATTENDING = [name for name in NETWORKS if name not in ("mmdit", "flux", "uvit")]


def build(name: str, **more: Any) -> nn.Module:
    """The network with random weights everywhere: those that start at zero would hide what stands before them."""
    torch.manual_seed(0)
    kind, options, _ = NETWORKS[name]
    network = denoisers.create(kind, **options, **more)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def conditioning(name: str, batch: int = 3, seed: int = 1, length: int = 5) -> Cond:
    """Text of which the first prompt has no token at all and the second all."""
    _, options, _ = NETWORKS[name]
    draw = torch.Generator().manual_seed(seed)
    rest: dict[str, Tensor] = {"guidance": torch.full((batch,), 3.5)}
    if "pooled_dim" in options:
        rest["pooled"] = torch.randn(batch, 6, generator=draw)
    if "num_classes" in options:
        rest["labels"] = torch.arange(batch) % 3
    if "low_res_channels" in options:
        rest |= {"low_res": torch.randn(batch, 3, 8, 8), "low_res_level": torch.full((batch,), 0.3)}
    if "embedding" in options or "sizes" in options:
        rest["size"] = torch.rand(batch, 3 if "sizes" in options else 2, generator=draw) * 100
    mask = torch.arange(length) < torch.tensor([0, length, 2, 1])[:batch, None]
    return Cond(torch.randn(batch, length, 12, generator=draw), mask, **rest)


def inputs(name: str, batch: int = 3) -> tuple[Tensor, Tensor]:
    side = 32 if name == "timm_unet" else 8
    return torch.randn(batch, 3, side, side), torch.linspace(0.9, 0.2, batch)


def projections(network: nn.Module) -> list[nn.Module]:
    """The layers that make keys and values of the text, or project it."""
    found: list[nn.Module] = []
    for layer in readers(network):
        found += [getattr(layer, part) for part in ("to_k", "kv", "context") if hasattr(layer, part)]
    more = ("text", "text_project", "y_embedder", "context_embedder", "txt_in", "context_embed")
    told = getattr(network, "told", None)
    return found + [
        part
        for owner in (network, told)
        for key in more
        if isinstance(part := getattr(owner, key, None), nn.Module)
    ]


def counting(modules: list[nn.Module]) -> dict[nn.Module, int]:
    calls = dict.fromkeys(modules, 0)

    def count(module: nn.Module, *_: Any) -> None:
        calls[module] += 1

    for module in modules:
        module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_answer_with_a_memory_is_the_same_to_the_last_bit(name: str) -> None:
    network, (x, t), cond = build(name), inputs(name), conditioning(name)
    expected = network(x, t, cond)
    prepared = network.prepare(cond)
    kept = NETWORKS[name][2] + 2 * len(readers(network))
    assert prepared.memory is not None
    assert len(prepared.memory) == kept
    assert all(len(tensor) == 3 for tensor in prepared.memory)
    calls = counting(projections(network))
    assert torch.equal(network(x, t, prepared), expected)
    assert calls
    assert set(calls.values()) == {0}
    # that the text matters at all, and that it is the memory that is read
    other = replace(network.prepare(conditioning(name, seed=2)), mask=prepared.mask)
    assert not torch.allclose(network(x, t, other), expected)
    swapped = replace(prepared, memory=other.memory)
    assert torch.equal(network(x, t, replace(other, low_res=cond.low_res)), network(x, t, swapped))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_slice_of_a_prepared_batch_is_a_prepared_slice(name: str) -> None:
    network, (x, t), cond = build(name), inputs(name), conditioning(name)
    whole, part = network.prepare(cond), network.prepare(cond[1:])
    # a product with another number of rows may add up in another order
    for ours, theirs in zip(whole[1:].memory, part.memory, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        network(x[1:], t[1:], whole[1:]), network(x, t, whole)[1:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("execution", ["batched", "split"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_run_reads_its_text_once(name: str, execution: str) -> None:
    network, (x, _) = build(name), inputs(name, 2)
    cond, uncond = conditioning(name, 2), conditioning(name, 2, seed=2)
    options: dict[str, Any] = {"cond": cond, "uncond": uncond, "guidance": 3.0, "execution": execution}
    sampler = samplers.create("dpmpp_2m")
    plainly = sampler.sample(denoise_fn(network, FLOW, "flow", **options, remember_text=False), x, FLOW, 4)
    denoise = denoise_fn(network, FLOW, "flow", **options)
    modules = projections(network)
    calls = counting(modules)
    assert torch.equal(sampler.sample(denoise, x, FLOW, 4), plainly)
    joined = 1 if execution == "batched" else 2
    assert set(calls.values()) == {joined}
    sampler.sample(denoise, x, FLOW, 2)  # another run: weights may have changed
    assert set(calls.values()) == {2 * joined}


GUIDANCE: dict[str, Callable[[nn.Module], Any]] = {
    "pag": lambda network: [3.0, {"name": "pag", "layers": [0], "scale": 2.0}],
    "slg": lambda network: [3.0, {"name": "slg", "layers": [0], "scale": 2.0}],
    "interval": lambda network: {"name": "cfg", "scale": 3.0, "interval": [0.5, 2.0]},
}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    "name", ["unet", "adm, joined", "adm of Stable Diffusion", "dit", "pixart", "mmdit", "flux"]
)
@torch.no_grad()
def test_guidance_that_changes_layers_or_branches_is_answered_alike(name: str, guidance: str) -> None:
    network, (x, _) = build(name), inputs(name, 2)
    cond, uncond = conditioning(name, 2), conditioning(name, 2, seed=2)
    options: dict[str, Any] = {"cond": cond, "uncond": uncond, "guidance": GUIDANCE[guidance](network)}
    runs = []
    for remember in (False, True):
        denoise = denoise_fn(network, FLOW, "flow", **options, remember_text=remember)
        runs.append(samplers.create("euler").sample(denoise, x, FLOW, 4))
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", ["unet", "adm of Stable Diffusion", "pixart", "mmdit"])
def test_a_conditioning_that_changes_is_read_at_every_step(name: str) -> None:
    network, (x, _) = build(name), inputs(name, 2)
    cond = conditioning(name, 2)
    runs, calls = [], counting(projections(network))
    for remember in (False, True):
        denoise = denoise_fn(
            network, FLOW, "flow", cond=cond, guidance={"name": "cads", "low": 0.0}, remember_text=remember
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            runs.append(samplers.create("euler").sample(denoise, x, FLOW, 3, generator=generator))
    assert torch.equal(*runs)
    assert min(calls.values()) == 6  # three steps twice


@pytest.mark.parametrize("name", ["unet", "adm of IF", "adm of Stable Diffusion", "dit", "pixart", "flux"])
def test_checkpointing_and_gradients_pass_through_a_memory(name: str) -> None:
    (x, t), cond = inputs(name, 2), conditioning(name, 2)
    gradients = []
    for checkpointing in (False, True):
        network = build(name, runtime={"checkpointing": checkpointing}).train()
        network(x, t, network.prepare(cond)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for plainly, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plainly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["unet", "adm of Stable Diffusion", "pixart"])
@torch.no_grad()
def test_a_network_compiles_whole_with_a_memory(name: str) -> None:
    network, (x, t), cond = build(name), inputs(name, 2), conditioning(name, 2)
    prepared = network.prepare(cond)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, prepared), network(x, t, prepared))
    assert compiled.prepare(cond).memory is not None  # found through the compiled module


@pytest.mark.parametrize("name", ATTENDING)
def test_text_that_does_not_fit_is_told_as_by_the_network(name: str) -> None:
    network, (x, t), cond = build(name), inputs(name), conditioning(name)
    for wrong in (replace(cond, tokens=None, mask=None), replace(cond, tokens=cond.tokens[..., :5])):
        with pytest.raises(KitError) as told:
            network(x, t, wrong)
        with pytest.raises(KitError) as prepared:
            network.prepare(wrong)
        assert str(prepared.value) == str(told.value)


def test_networks_without_text_have_nothing_to_prepare() -> None:
    cond = Cond(labels=torch.tensor([1]))
    options: Mapping[str, Mapping[str, Any]] = {
        "unet": {**UNET, "num_classes": 3},
        "adm": {**plain(heads=2), "style": GROUPS, "num_classes": 3},
        "dit": {"width": 32, "depth": 1, "heads": 2, "num_classes": 3},
    }
    for kind, given in options.items():
        assert denoisers.create(kind, **given).prepare(cond) is cond

"""One evaluation of a denoiser: ours, diffusers' model with the same weights, imagen-pytorch's of a like size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import denoisers, performance
from imagen_kit.bench.peers.models import PEERS, Peer, beside
from imagen_kit.bench.subject import OURS, Built, Subject, Unavailable
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import (
    Replayed,
    Told,
    Way,
    Work,
    chosen_peers,
    dtype_of,
    random_inputs,
    random_network,
)


@register("denoiser", names=denoisers.names)
def denoiser(
    name: str,
    device: torch.device,
    *,
    network: Mapping[str, Any] | None = None,
    resolution: int = 64,
    batch: int = 1,
    dtype: str = "fp32",
    channels_last: bool | None = None,
    mode: str = "eager",
    attention: str | None = None,
    quantise: str = "off",
    prepack: bool | None = None,
    tokens: int = 77,
    peers: str = "all",
) -> Built:
    """A forward pass of a registered denoiser with random weights and inputs.

    Args:
        name: of the denoiser.
        device: where.
        network: its constructor's options.
        resolution: side of x, which for a latent model is that of the latents.
        batch: samples; evaluations are counted by sample.
        dtype: fp32, bf16, fp16, or auto: the kit's choice, for all.
        channels_last: memory format of convolutions, for all; None leaves it to the kit, and peers as they are.
        mode: eager, compile, compile_blocks, graph or compile_graph; of ours (peers have theirs by name).
        attention: backend of ours.
        quantise: of our weights.
        prepack: our weights, for a CPU; auto has it unasked.
        tokens: text tokens, where it reads text.
        peers: all, none, or some of diffusers, diffusers compiled, imagen_pytorch, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    way = Way(dtype, channels_last, mode, attention, quantise, prepack)
    wanted = chosen_peers(peers, PEERS)
    module = random_network(name, network, device)
    told = random_inputs(module, batch, resolution, tokens, device)
    others = beside(wanted, module, resolution)  # copies of the weights, before anything is done to them
    own, way = ours(module, told, way, device)
    built: Built = {OURS: own}
    for who, peer in others.items():
        built[who] = peer if isinstance(peer, Unavailable) else theirs(peer, told, way)
    return built


def ours(module: nn.Module, told: Told, way: Way, device: torch.device) -> tuple[Subject | Unavailable, Way]:
    """Our network run in a way, and the way with ``auto`` resolved."""
    reason = way.lacks(device)
    if reason is not None:
        return Unavailable(reason), way
    applied = performance.apply(module, way.performance, device)
    seen = told.to(dtype_of(module))

    @torch.no_grad()
    def run() -> Tensor:
        return module(seen.x, seen.times, seen.cond)

    work = Work(
        Replayed(run) if way.graph else run,
        "evaluations",
        len(seen.x),
        modules=[module],
        inputs=seen.tensors,
        note=applied.words,
        eager=run,
        precision=None if way.quantise == "off" else way.quantise.split("_")[0],
    )
    return work, replace(way, dtype=applied.chosen.dtype or way.dtype)


def theirs(peer: Peer, told: Told, way: Way) -> Subject:
    """A peer's network, in the same precision."""
    peer.prepare(way)
    seen = told.to(dtype_of(peer.model))
    call, run_by = torch.no_grad()(peer.call(seen)), peer.run_by
    return Work(
        lambda: call(run_by),
        "evaluations",
        len(seen.x),
        modules=[peer.model],
        inputs=seen.tensors,
        note=peer.note,
        eager=call,
        comparable=peer.same,
    )

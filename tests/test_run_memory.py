"""What a sampling run keeps in memory beside the network: counted over every tensor that torch makes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagen_kit import denoise_fn, denoisers, samplers, schedules
from imagen_kit.conditioning import Cond, TextEmbeddings
from imagen_kit.pipeline import Pipeline
from imagen_kit.samplers import arena
from imagen_kit.stage import Stage

COSINE = schedules.create("cosine")


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside the block and still there; ``peak`` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.others: dict[int, StorageWeakRef] = {}  # that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.others = {key: kept for key, kept in self.others.items() if not kept.expired()}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.others[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.others:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    @property
    def bytes(self) -> int:
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())


def unet(channels: int = 24) -> nn.Module:
    levels = [{"channels": channels, "blocks": 2}, {"channels": channels, "blocks": 1, "attention": True}]
    return denoisers.create("unet", levels=levels, head_dim=8, context_dim=8).eval()


def text(batch: int) -> Cond:
    return Cond(torch.randn(batch, 6, 8), torch.ones(batch, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("sampler", "guidance"), [("ddpm", ()), ("ddpm", 3.0), ("heun", 3.0), ("dpmpp_2m", 3.0), ("unipc", 3.0)]
)
@torch.no_grad()
def test_a_run_needs_little_more_than_one_evaluation(
    sampler: str, guidance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "fits", lambda plan, x: False)  # small pictures lie in one buffer on the CPU
    network, x = unet(), torch.randn(2, 3, 16, 16)
    cond = text(2)
    once = Live()
    with once:  # the network's own part: of all that guidance evaluates together, text and all
        both = network.prepare(Cond.cat([cond, cond]) if guidance else cond)
        network(torch.cat([x, x]) if guidance else x + 0, torch.zeros(4 if guidance else 2), both)
    denoise = denoise_fn(network, COSINE, "v", cond=cond, uncond=cond, guidance=guidance)
    run = Live()
    with run:
        samplers.create(sampler).sample(denoise, x, COSINE, 4)
    assert run.peak <= 1.1 * once.peak, run.peak / once.peak


@torch.no_grad()
def test_nothing_of_a_run_outlives_it() -> None:
    network, x, cond = unet(8), torch.randn(1, 3, 16, 16), text(1)
    denoise = denoise_fn(network, COSINE, "v", cond=cond, uncond=cond, guidance=3.0)
    live = Live()
    with live:
        sample = samplers.create("dpmpp_2m").sample(denoise, x, COSINE, 4)
    assert live.bytes == sample.untyped_storage().nbytes()


@torch.no_grad()
def test_earlier_states_and_answers_are_let_go() -> None:
    """While a multistep sampler of second order evaluates, it needs the answer before and nothing else."""
    given: list[weakref.ref[Tensor]] = []
    said: list[weakref.ref[Tensor]] = []
    counts = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        alive = [ref() for ref in given]
        states = sum(state is not None and state is not start for state in alive)
        counts.append((states, sum(ref() is not None for ref in said)))
        out = x * 0.5
        given.append(weakref.ref(x))
        said.append(weakref.ref(out))
        return out

    start = torch.randn(1, 3, 64, 64)  # more than ``arena`` takes
    denoise = denoise_fn(network, COSINE, "x0")
    samplers.create("dpmpp_2m").sample(denoise, start, COSINE, 8)
    assert max(states for states, _ in counts) == 0
    assert max(answers for _, answers in counts) == 1


def test_a_pipeline_keeps_nothing_of_a_stage_while_it_decodes() -> None:
    live = Live()

    class Codec:
        factor, channels, seen = 1, 3, 0

        def decode(self, latents: Tensor) -> Tensor:
            self.seen = live.bytes
            return latents

    def encode(texts: list[str]) -> TextEmbeddings:
        return TextEmbeddings(torch.ones(len(texts), 6, 8), torch.ones(len(texts), 6, dtype=torch.bool))

    codec = Codec()
    stage = Stage(
        name="base",
        denoiser=unet(8),
        schedule=COSINE,
        prediction="v",
        sampler=samplers.create("dpmpp_2m"),
        size=64,
        steps=3,
        guidance=(3.0,),
        codec=codec,
    )
    pipeline = Pipeline(encode, [stage])
    with live:
        pipeline("a")
    latents, told = 3 * 64 * 64 * 4, 2 * 6 * 8 * 4 * 3  # and the text, by prompt and by picture
    assert latents <= codec.seen <= latents + told + 1024

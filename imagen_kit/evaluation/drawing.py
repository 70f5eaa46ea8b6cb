"""Drawing with another sampler than the recipe's, and counting what that costs.

Axes: b pictures, c h w.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.caches.base import StepCache
from imagen_kit.cascade import LowRes
from imagen_kit.denoisers.layers.inner import counting
from imagen_kit.evaluation.memory import PeakMemory
from imagen_kit.evaluation.spec import OWN
from imagen_kit.pipeline import Pipeline


@dataclass
class Drawn:
    """Pictures of one setting and what they cost.

    Attributes:
        first: (b, c, h, w) the first stage's result in [0, 1] (latents of a latent model: decoded).
        final: (b, 3, s, s) the last stage's, in [0, 1].
        calls: network calls a batch, by stage.
        rows: network evaluations a picture, by stage: guidance doubles these and not the calls.
        seconds: wall clock of the whole pipeline for all pictures.
        memory: bytes at the peak, see ``PeakMemory``; None where the system does not tell.
        saved: share of the blocks of the first stage's network that a step cache left out.
    """

    first: Tensor
    final: Tensor
    calls: dict[str, int]
    rows: dict[str, float]
    seconds: float
    memory: int | None = None
    saved: float = 0.0


@dataclass
class _Counter:
    """Counts a stage's network calls where they happen; hooks, so that guidance and solvers cannot hide any."""

    tick: Callable[[], None]
    calls: int = 0
    rows: int = 0

    def watch(self, network: nn.Module) -> Any:
        """Count this network's calls too; the handle ends it."""
        return network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.calls += 1
        self.rows += len(inputs[0] if inputs else named["x"])
        self.tick()


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Any,
    steps: int,
    guidance: Any = None,
    batch_size: int | None = None,
    tick: Callable[[], None] = lambda: None,
    cache: StepCache | str | None = OWN,
) -> Drawn:
    """Run a pipeline with another sampler in its first stage; keep that stage's result and count calls.

    Args:
        pipeline: the model.
        prompts, seeds: b texts and b seeds.
        sampler, steps: of the first stage; the others keep theirs.
        guidance: of the first stage, e.g. another scale; None = its own.
        batch_size: pictures at a time; None = all.
        tick: called at every network call.
        cache: of the first stage; None = none, ``OWN`` = its own.
    """
    base = pipeline.stages[0]
    if cache != OWN:
        base, pipeline = replace(base, cache=cache), copy.copy(pipeline)
        pipeline.stages = [base, *pipeline.stages[1:]]
    latents: list[Tensor] = []

    def keep(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        if stage != base.name:
            return
        if step == 0:
            latents.append(x)
        latents[-1] = x

    with ExitStack() as stack:
        counters = {stage.name: _Counter(tick) for stage in pipeline.stages}
        for stage in pipeline.stages:
            for network in stage.modules:
                stack.callback(counters[stage.name].watch(network).remove)
        count = stack.enter_context(counting(base.denoiser))
        memory = stack.enter_context(PeakMemory(pipeline.device))
        began = time.perf_counter()
        # .cpu() waits for the device, so the clock sees the work and not its launch
        final = pipeline(
            list(prompts),
            seed=list(seeds),
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            callback=keep,
        ).tensor.cpu()
        seconds = time.perf_counter() - began
    with torch.no_grad():
        first = torch.cat([base.codec.decode(x).float().clamp(-1, 1).cpu() for x in latents]) / 2 + 0.5
    return Drawn(
        first=first,
        final=final,
        calls={name: round(counter.calls / len(latents)) for name, counter in counters.items()},
        rows={name: counter.rows / len(prompts) for name, counter in counters.items()},
        seconds=seconds,
        memory=memory.bytes,
        saved=count.saved,
    )


def fingerprint(pipeline: Pipeline) -> str:
    """A short digest of all that decides a picture but its prompt, seed, and first sampler and guidance.

    The denoisers' weights enter whole; of the text encoder's, which may be many gigabytes, a part of each.
    """
    digest = hashlib.sha256(pipeline.unconditional.encode())
    for i, stage in enumerate(pipeline.stages):
        facts: tuple[Any, ...] = (
            stage.name,
            stage.size,
            stage.prediction,
            stage.guidance,
            stage.low_res_level,
        )
        later = (stage.sampler, stage.steps) if i else ()
        if stage.cache is not None:
            facts += (stage.cache,)
        if stage.low_res != LowRes():
            noising = stage.low_res.schedule
            facts += (
                stage.low_res.told,
                stage.low_res.align_corners,
                type(noising).__name__,
                _options(noising),
            )
        parts = [(type(part).__name__, _options(part)) for part in (stage.schedule, stage.codec)]
        digest.update(repr((facts, later, parts)).encode())
        for name, network in (("", stage.denoiser), *sorted(stage.networks.items())):
            digest.update(name.encode())
            _add_weights(digest, network)
    for encoder in pipeline.text_encoders:
        digest.update(type(encoder).__name__.encode())
        if isinstance(encoder, nn.Module):
            _add_weights(digest, encoder, most=4096)
    return digest.hexdigest()[:16]


def _options(part: Any) -> list[tuple[str, Any]]:
    """The plain numbers and words among a part's attributes."""
    own = vars(part) if hasattr(part, "__dict__") else {}
    return sorted((key, value) for key, value in own.items() if isinstance(value, bool | int | float | str))


def _add_weights(digest: Any, network: nn.Module, most: int | None = None) -> None:
    """Names, shapes and values of a network's tensors; of long ones ``most`` values spread over them."""
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().reshape(-1)
        if most is not None and len(flat) > most:
            flat = flat[:: len(flat) // most]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())

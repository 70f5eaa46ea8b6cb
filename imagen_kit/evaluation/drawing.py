"""Drawing with another sampler than the recipe's, and counting what that costs.

Axes: b pictures, c h w.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import samplers as registry
from imagen_kit.pipeline import Pipeline, Stage

GRID_OPTIONS = ("spacing", "final", "offset", "rho")
"""Options of a recipe's sampler that a swapped one keeps."""


@dataclass
class Drawn:
    """Pictures of one setting and what they cost.

    Attributes:
        first: (b, c, h, w) the first stage's result in [0, 1] (latents of a latent model: decoded).
        final: (b, 3, s, s) the last stage's, in [0, 1].
        calls: network calls a batch, by stage.
        rows: network evaluations a picture, by stage: guidance doubles these and not the calls.
        seconds: wall clock of the whole pipeline for all pictures.
    """

    first: Tensor
    final: Tensor
    calls: dict[str, int]
    rows: dict[str, float]
    seconds: float


@dataclass
class _Counter:
    """Counts a network's calls where they happen; a hook, so that guidance and solvers cannot hide any."""

    tick: Callable[[], None]
    calls: int = 0
    rows: int = 0
    handle: Any = field(default=None, repr=False)

    def watch(self, network: nn.Module) -> _Counter:
        self.handle = network.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def _count(self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.calls += 1
        self.rows += len(inputs[0] if inputs else named["x"])
        self.tick()


def make_sampler(stage: Stage, name: str) -> Any:
    """The sampler ``name`` with the grid options (spacing, final, ...) of the stage's sampler that it takes.

    Raises:
        KitError: no such sampler.
    """
    missing = set(registry.registry.check(name, {}))
    kept = {key: getattr(stage.sampler, key) for key in GRID_OPTIONS if hasattr(stage.sampler, key)}
    kept = {key: v for key, v in kept.items() if set(registry.registry.check(name, {key: v})) <= missing}
    return registry.create(name, **kept)


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Any,
    steps: int,
    batch_size: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Drawn:
    """Run a pipeline with another sampler in its first stage; keep that stage's result and count calls.

    Args:
        pipeline: the model.
        prompts, seeds: b texts and b seeds.
        sampler, steps: of the first stage; the others keep theirs.
        batch_size: pictures at a time; None = all.
        tick: called at every network call.
    """
    base = pipeline.stages[0]
    latents: list[Tensor] = []

    def keep(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        if stage != base.name:
            return
        if step == 0:
            latents.append(x)
        latents[-1] = x

    with ExitStack() as stack:
        counters = {stage.name: _Counter(tick).watch(stage.denoiser) for stage in pipeline.stages}
        for counter in counters.values():
            stack.callback(counter.handle.remove)
        began = time.perf_counter()
        # .cpu() waits for the device, so the clock sees the work and not its launch
        final = pipeline(
            list(prompts),
            seed=list(seeds),
            sampler=sampler,
            steps=steps,
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
    )


def fingerprint(pipeline: Pipeline) -> str:
    """A short digest of all weights and of what else decides a picture, to tell two models apart."""
    digest = hashlib.sha256()
    for stage in pipeline.stages:
        facts = (stage.name, stage.size, stage.prediction, stage.guidance, stage.low_res_level, stage.steps)
        digest.update(repr(facts).encode())
        for key, value in sorted(stage.denoiser.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

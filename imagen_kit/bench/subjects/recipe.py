"""Whole recipes from embeddings to pictures: our pipeline, and diffusers' own with the same weights and noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers import networks, pipelines
from imagen_kit.bench.subject import OURS, Built, Subject
from imagen_kit.bench.subjects import register
from imagen_kit.bench.systems import Asked, Settings, System
from imagen_kit.bench.work import TORCH, Work, attempt, chosen_peers
from imagen_kit.errors import KitError
from imagen_kit.stage import Stage

PEERS = ("diffusers", "diffusers compiled")


@register("recipe")
def recipe(
    name: str,
    device: torch.device,
    *,
    size: str = "full",
    set: Sequence[str] = (),
    stages: int | None = None,
    weights: str = "random",
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 1,
    dtype: str = "fp32",
    performance: Mapping[str, Any] | None = None,
    peers: str = "all",
) -> Built:
    """Drawing a batch of pictures.

    With random weights the text is given, too: ours reads embeddings that are there already, as the others do. A
    decoder runs in the networks' precision, as diffusers' pipelines have it.

    Args:
        name: a shipped recipe's, or a file.
        device: where.
        size: full, or the variants small and tiny of published recipes.
        set: changes to the recipe, as ``--set`` takes them.
        stages: how many of its stages; None for all, of small and tiny variants for the first.
        weights: random, or real: those that the recipe names, and its own text encoder.
        sampler: of the first stage: a name of ours, or of a diffusers class (``DDIMScheduler``).
        steps: of every stage.
        guidance: scale in the first stage.
        batch: pictures.
        dtype: fp32, bf16, fp16, or auto: the kit's choice, for all.
        performance: of every stage: compile, memory_format, graph, attention, quantise, remember_text.
        peers: all, none, or some of diffusers, diffusers compiled, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    wanted = chosen_peers(peers, PEERS)
    asked = Asked(name, size, tuple(set), stages, weights, performance)
    return build(System(asked, Settings(sampler, steps, guidance, batch, dtype), device), wanted)


def build(system: System, wanted: Sequence[str]) -> Built:
    """Our pipeline and the peers asked for; their copies of the weights are made before ours are changed."""
    copies = attempt(partial(twins, system)) if wanted else None
    system.run_as_told()
    built: Built = {OURS: ours(system)}
    for who in wanted:
        if isinstance(copies, tuple):
            built[who] = attempt(partial(theirs, system, *copies, compiled=who == PEERS[1]))
        elif copies is not None:
            built[who] = copies
    return built


def ours(system: System) -> Subject:
    """Our pipeline."""

    note = words(system.pipeline.stages[0])

    def drawn() -> Tensor:
        out, obstacles = system.draw(), system.pipeline.loops.obstacles
        if obstacles:  # a loop that is not recorded is not to be read as one that is
            work.note = f"{note}; without a graph: {', '.join(obstacles)}"
        return out

    def counted() -> Tensor:
        with unrecorded(system):
            return system.draw()

    work = Work(
        drawn,
        "pictures",
        system.settings.batch,
        modules=system.modules,
        note=note,
        eager=counted,
        steps=system.steps,
        passes=system.evaluations,
    )
    return work


def words(stage: Stage) -> str:
    """How a stage runs, for a note."""
    return f"{stage.performance.brief()}, sampler {stage.sampler.name}"


@contextlib.contextmanager
def unrecorded(system: System) -> Iterator[None]:
    """A block of code in which no loop is replayed from a CUDA graph, whose operations nothing could count."""
    pipeline = system.pipeline
    told = pipeline.stages
    pipeline.stages = [replace(s, performance=replace(s.performance, graph=False)) for s in told]
    try:
        yield
    finally:
        pipeline.stages = told


def twins(system: System) -> tuple[nn.Module, nn.Module | None]:
    """diffusers' network and autoencoder with the weights of the first stage."""
    if system.offloaded:
        raise KitError("an offloaded recipe has no weights in memory to share; compare it without offload")
    if len(system.pipeline.stages) > 1:
        raise KitError("diffusers has a pipeline for each stage; compare one: stages: 1")
    stage: Any = system.pipeline.stages[0]
    side = stage.size // stage.codec.factor
    codec = networks.twin(stage.codec, stage.size) if isinstance(stage.codec, nn.Module) else None
    return networks.twin(stage.denoiser, side), codec


def theirs(
    system: System,
    model: nn.Module,
    codec: nn.Module | None,
    compiled: bool = False,
    reader: pipelines.Reader | None = None,
) -> Subject:
    """diffusers' pipeline in the precision that ours runs in; with a reader, from texts on."""
    (stage,) = system.stages
    dtype = TORCH[stage.performance.dtype or "fp32"]
    for part in filter(None, (model, codec)):
        part.to(dtype=dtype)
    if system.recipe.stages[0].performance.memory_format == "channels_last":  # asked for, not chosen for ours
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = system.given(dtype)
    run, eager, note = pipelines.painter(stage, model, codec, given, compiled, reader)
    read = [] if reader is None else [reader.network]
    return Work(
        run,
        "pictures",
        system.settings.batch,
        modules=[part for part in (model, codec, *read) if part is not None],
        inputs=[given.noise],
        note=note,
        eager=eager,
        steps=given.steps,
        passes=system.evaluations,
        comparable=dtype is torch.float32 or not _draws(stage),  # noise is drawn in the dtype there
    )


def _draws(stage: Stage) -> bool:
    """Whether the sampler draws noise; one without a tableau may."""
    try:
        return stage.sampler.tableau(stage.schedule, stage.steps).noises > 0
    except NotImplementedError:
        return True

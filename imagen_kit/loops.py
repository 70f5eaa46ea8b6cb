"""A stage's sampling loop: as it stands, or recorded as a CUDA graph and replayed for later batches.

A recorded loop is the network, the guidance and the sampler's sums of all steps, launched as a whole. What differs
from batch to batch enters by buffers: the starting noise, every noise of the run, drawn beforehand in the order in
which the plain loop draws it, and the conditionings. So a picture is the same function of prompt, seed and settings.

The first loop of its kind is a plain one, which also warms libraries up and counts what the loop draws and
evaluates; the second is recorded. Where the first one waited for the device, which some libraries do once, the second
is looked at likewise: a loop that always waits cannot be recorded, and is not tried, as a recording that fails leaves
the device in disorder. A kind is the stage's parts, its weights' places in memory, and the shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagen_kit.conditioning import Cond
from imagen_kit.samplers.graphs import CudaGraph, Graph, Recorded, waiting
from imagen_kit.samplers.tableau import Callback, Noise
from imagen_kit.sending import send
from imagen_kit.stage import Counted, Stage, denoiser

#: Most loops kept, and most bytes of noise that a recorded loop may hold.
LOOPS, NOISE_BYTES = 8, 1 << 30


@dataclass
class _Loop:
    """What is known of one kind of loop.

    Attributes:
        kind: what tells it from others.
        draws, calls: noises drawn in a run, and evaluations.
        looks: plain loops from which that was learned.
        known: whether no further look is needed.
        recorded: once it is.
        obstacle: why it cannot be.
    """

    kind: tuple[Any, ...]
    draws: int = 0
    calls: int = 0
    looks: int = 0
    known: bool = False
    recorded: Recorded | None = None
    obstacle: str | None = None


class Loops:
    """Runs stages' loops, and keeps those that were recorded.

    A replay reads the networks' weights where they lie, so weights that are changed in place count at once, and
    weights in another place make another kind. Of other changes to a network (options, hooks) a recorded loop
    knows nothing: ``clear`` after them.

    Args:
        graph: makes what records, given the device; by default a CUDA graph, on CUDA devices alone.
    """

    def __init__(self, graph: Callable[[torch.device], Graph] | None = None):
        self._graph = graph
        self._pool: Any = None
        self._loops: list[_Loop] = []
        self._told: set[tuple[str, str]] = set()

    @property
    def obstacles(self) -> list[str]:
        """Why loops that should be recorded are not: ``stage: reason``, each once."""
        return sorted(f"{stage}: {obstacle}" for stage, obstacle in self._told)

    def clear(self) -> None:
        """Forget all recorded loops."""
        self._loops.clear()

    def sample(
        self,
        stage: Stage,
        x: Tensor,
        conds: Mapping[str, Cond],
        draw: Noise,
        generators: list[torch.Generator],
        tick: Callable[[], None],
        callback: Callback | None = None,
    ) -> Tensor:
        """Latents (b, c, h, w) of a stage.

        Args:
            stage: with ``performance.graph`` where its loop may be recorded.
            x: (b, c, h, w) starting noise.
            conds: conditionings by name.
            draw: () -> tensor like x, the run's noise in order.
            generators: one a sample, for the noise that guidance draws.
            tick: called at every evaluation (after a replay: as often).
            callback: (step, x, x0) after every sampler step.
        """

        def plain(draw: Noise = draw, tick: Callable[[], None] = tick) -> Tensor:
            denoise = Counted(denoiser(stage, conds), generators, tick)
            return stage.sampler.sample(
                denoise, x, stage.schedule, stage.steps, noise=draw, callback=callback
            )

        if not stage.performance.graph:
            return plain()
        obstacle = self._obstacle(stage, x, callback)
        if obstacle is not None:
            self._tell(stage, obstacle)
            return plain()
        conds = _dense(conds)
        kind = _kind(stage, x, conds)
        loop = next((loop for loop in self._loops if loop.kind == kind), None)
        if loop is None:
            loop = _Loop(kind)
            self._loops = [*self._loops[1 - LOOPS :], loop]
        if not loop.known:
            latents = _look(loop, x, draw, generators, tick, plain)
            self._tell(stage, loop.obstacle)
            return latents
        if loop.obstacle is None:
            drawn = [draw() for _ in range(loop.draws)]
            inputs = [x, *drawn, *_flat(conds)[1]]
            if loop.recorded is None:
                loop.obstacle = self._record(loop, stage, inputs, conds)
            if loop.recorded is not None:
                latents = loop.recorded(*inputs)
                for _ in range(loop.calls):
                    tick()
                return latents
            self._tell(stage, loop.obstacle)
            return plain(iter(drawn).__next__)
        return plain()

    def _obstacle(self, stage: Stage, x: Tensor, callback: Callback | None) -> str | None:
        """Why a loop cannot be recorded, as far as that is known beforehand."""
        if self._graph is None and x.device.type != "cuda":
            return f"CUDA graphs are for CUDA devices, not {x.device.type}"
        if callback is not None:
            return "a callback is told of every step"
        if stage.cache is not None and not stage.cache.capturable:
            return "its cache decides on the host"
        if getattr(stage.sampler, "decides", True):
            return f"sampler {stage.sampler.name!r} decides on its steps as it goes"
        return None

    def _tell(self, stage: Stage, obstacle: str | None) -> None:
        """Say once why a stage's loop is not recorded."""
        if obstacle is not None and (stage.name, obstacle) not in self._told:
            self._told.add((stage.name, obstacle))
            warnings.warn(f"stage {stage.name!r} runs without a graph: {obstacle}", stacklevel=2)

    def _record(
        self, loop: _Loop, stage: Stage, inputs: list[Tensor], conds: Mapping[str, Cond]
    ) -> str | None:
        """Record a loop; why that failed."""
        places, draws = _flat(conds)[0], loop.draws

        def run(x: Tensor, *rest: Tensor) -> Tensor:
            made: dict[str, dict[str, Any]] = {}
            for name, field, index in places:
                made.setdefault(name, {})[field] = rest[draws + index]
            denoise = denoiser(stage, {name: Cond(**parts) for name, parts in made.items()})
            source: Iterator[Tensor] = iter(rest[:draws])
            return stage.sampler.sample(denoise, x, stage.schedule, stage.steps, noise=source.__next__)

        try:
            loop.recorded = Recorded(run, inputs, self._make(inputs[0].device))
        except Exception as error:  # what is wrong with the loop itself its plain run will say
            said = str(error).strip() or type(error).__name__
            return f"it cannot be recorded ({said.splitlines()[0]})"
        return None

    def _make(self, device: torch.device) -> Graph:
        if self._graph is not None:
            return self._graph(device)
        # Loops share memory: none runs while another does, or keeps anything from one replay to the next.
        if not any(loop.recorded for loop in self._loops):
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(device, self._pool)


def _look(
    loop: _Loop,
    x: Tensor,
    draw: Noise,
    generators: list[torch.Generator],
    tick: Callable[[], None],
    plain: Callable[..., Tensor],
) -> Tensor:
    """A plain loop, from which the rest is learned."""
    loop.draws = loop.calls = 0

    def drawing() -> Tensor:
        loop.draws += 1
        return draw()

    def ticking() -> None:
        loop.calls += 1
        tick()

    before = [generator.get_state() for generator in generators]
    with waiting(x.device) as waits:
        latents = plain(drawing, ticking)
    after = [generator.get_state() for generator in generators]
    loop.looks += 1
    loop.known = loop.looks > 1 or not waits
    if any(not torch.equal(*pair) for pair in zip(before, after, strict=True)):
        loop.obstacle = "its guidance draws noise"
    elif loop.draws * x.numel() * 4 > NOISE_BYTES:
        loop.obstacle = f"its {loop.draws} noises take more than {NOISE_BYTES >> 30} GiB"
    elif waits and loop.known:
        loop.obstacle = f"it waits for the device ({waits[0]})"
    return latents


def _dense(conds: Mapping[str, Cond]) -> dict[str, Cond]:
    """Conditionings whose tensors lie in memory as their copies will, so that compiled code meets one layout."""
    known: dict[int, Tensor] = {}

    def dense(value: Tensor) -> Tensor:
        if id(value) not in known:
            lies_so = torch.empty_like(value, device="meta").stride() == value.stride()
            known[id(value)] = value if lies_so else value.contiguous()
        return known[id(value)]

    return {name: cond.map(dense) for name, cond in conds.items()}


def _flat(conds: Mapping[str, Cond]) -> tuple[tuple[tuple[str, str, int], ...], list[Tensor]]:
    """(conditioning, field, place of its tensor) of all fields, and the tensors, each once."""
    places: list[tuple[str, str, int]] = []
    tensors: list[Tensor] = []
    known: dict[int, int] = {}
    for name, cond in conds.items():
        for field, value in cond.parts().items():
            if id(value) not in known:
                known[id(value)] = len(tensors)
                tensors.append(value)
            places.append((name, field, known[id(value)]))
    return tuple(places), tensors


def _kind(stage: Stage, x: Tensor, conds: Mapping[str, Cond]) -> tuple[Any, ...]:
    """What a recorded loop is bound to."""
    places, tensors = _flat(conds)
    weights = (part for module in stage.modules for part in (*module.parameters(), *module.buffers()))
    return (
        tuple(id(module) for module in stage.modules),
        tuple(_address(weight) for weight in weights),
        (stage.schedule, stage.prediction, stage.sampler, stage.steps, stage.sigma_data),
        (stage.guidance, stage.execution, stage.cache, stage.performance),
        places,
        tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (x, *tensors)),
    )


def _address(weight: Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # a tensor made of several, such as quantised ones
        return id(weight)


def noise_source(
    generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Callable[[], Tensor]:
    """() → (b, *shape) standard normal, row by row from the samples' own CPU generators."""

    def draw() -> Tensor:
        return send(
            torch.stack([torch.randn(shape, generator=generator) for generator in generators]), device
        )

    return draw

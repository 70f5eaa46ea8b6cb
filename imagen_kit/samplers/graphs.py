"""Functions of tensors recorded once as a CUDA graph, a whole sampling run with its network above all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.base import begin
from imagen_kit.samplers.noise import Generators, gaussian
from imagen_kit.samplers.tableau import Denoise, Noise, Tableau

#: Runs before the capture, in which libraries choose their kernels and allocate their workspaces.
WARM_UP = 3


class Graph(Protocol):
    """What records the kernels of a function and launches them again."""

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function, recording; the tensor that every replay fills."""
        ...

    def replay(self) -> None:
        """Launch what was recorded: on the same memory, without the function's Python."""
        ...


class CudaGraph:
    """A ``Graph`` of CUDA kernels.

    Args:
        device: where they run.
        pool: memory shared with other graphs that never run at the same time, of
            ``torch.cuda.graph_pool_handle()``; None for memory of its own.
        generators: on that device; what the function draws from them goes on from replay to replay.
    """

    def __init__(self, device: torch.device, pool: Any = None, generators: Sequence[torch.Generator] = ()):
        self._device, self._pool, self._graph = device, pool, torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        # thread_local: another thread that loads data may go on allocating
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        self._graph.replay()


class Recorded:
    """A function of tensors, recorded: ``recorded(*inputs)`` is a new tensor, the function's answer to them.

    The function is run once, by the recorder, and must then launch the same kernels whatever the inputs hold. Its
    inputs are copied into buffers that stay.

    Args:
        function: ``function(*inputs) -> tensor``; called without gradients.
        inputs: of the shapes, dtypes and device of every later call.
        graph: what records.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], graph: Graph):
        self._inputs, self._graph = [tensor.clone() for tensor in inputs], graph
        with torch.no_grad():
            self._result = graph.record(lambda: function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            return self._result.clone()


def graphed(
    denoise: Denoise,
    tableau: Tableau,
    x: Tensor,
    generator: Generators | None = None,
    *,
    noise: Noise | None = None,
    graph: Callable[[torch.device], Graph] | None = None,
) -> Callable[[Tensor], Tensor]:
    """The run of a tableau as a function ``sample(x) -> sample`` that replays a CUDA graph.

    A tableau's times and weights are numbers of the host and nothing in its run waits for the device, so the
    run can be recorded once and launched as a whole: a step then costs what its kernels cost. The network must
    be capturable too (fixed shapes, no ``item``). On other devices the tableau is simply run.

    Args:
        denoise: (x, t) -> x0, as for ``Tableau.run``.
        tableau: of a sampler on its schedule and grid.
        x: (b, ...) of the shape, dtype and device of every later call.
        generator: source of noise, on x's device; every replay goes on drawing from it.
        noise: () -> tensor like x, in place of a generator; drawn from ``tableau.noises`` times before every
            replay, in the order of the run, so that it may come from anywhere.
        graph: makes what records, given the device; by default a ``CudaGraph`` where x is on a CUDA device.

    Returns:
        ``sample(x)``: (b, ...) noisy start -> the sample, a new tensor.

    Raises:
        KitError: noise and generator, a generator of another device, or (when called) x of another shape, dtype
            or device.
    """
    if noise is not None and generator is not None:
        raise KitError("give either noise or a generator, not both")
    single = isinstance(generator, torch.Generator)
    each: list[torch.Generator] = [] if generator is None else [generator] if single else list(generator)  # type: ignore[list-item,arg-type]

    def run(start: Tensor, *drawn: Tensor) -> Tensor:
        ready = begin(denoise, tableau.times, generator, tableau.plan.parts)
        source = iter(drawn).__next__ if drawn else noise or gaussian(start, generator)
        return tableau.run(ready, start, source)

    def checked(start: Tensor) -> Tensor:
        if (start.shape, start.dtype, start.device) != (x.shape, x.dtype, x.device):
            raise KitError(
                f"this run was made for x of {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"not {tuple(start.shape)} {start.dtype} on {start.device}"
            )
        return start

    if graph is None:
        if x.device.type != "cuda":
            return lambda start: run(checked(start))
        if any(source.device.type != "cuda" for source in each):
            raise KitError("a CUDA graph draws its noise on the device; give generators of the device 'cuda'")
        _warm_up(lambda: run(x, *_like(x, noise, tableau)), x.device, each)

    recorder = CudaGraph(x.device, generators=each) if graph is None else graph(x.device)
    recorded = Recorded(run, [x, *_like(x, noise, tableau)], recorder)
    count = 0 if noise is None else tableau.noises

    def replay(start: Tensor) -> Tensor:
        return recorded(checked(start), *(noise() for _ in range(count)))  # type: ignore[misc]

    return replay


def _like(x: Tensor, noise: Noise | None, tableau: Tableau) -> list[Tensor]:
    """Stand-ins for the run's noise, for which nothing is drawn."""
    count = 0 if noise is None else tableau.noises
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(count)]


def _warm_up(run: Callable[[], Tensor], device: torch.device, generators: Sequence[torch.Generator]) -> None:
    """Some runs beside the current stream, of which the generators keep no trace."""
    states = [source.get_state() for source in generators]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    for source, state in zip(generators, states, strict=True):
        source.set_state(state)

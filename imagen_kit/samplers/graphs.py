"""Functions of tensors recorded once as a CUDA graph, a whole sampling run with its network above all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.base import begin
from imagen_kit.samplers.noise import Generators, gaussian
from imagen_kit.samplers.tableau import Denoise, Noise, Tableau

#: Runs before the capture, in which libraries choose their kernels and allocate their workspaces.
WARM_UP = 3
#: What torch says of an operation that waits, in its debug mode.
WAITED = "called a synchronizing CUDA operation"


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
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
        for generator in generators:
            self._graph.register_generator_state(generator)

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function, recording; what it raises gets out, and the device is as it was before."""
        before, raised = torch.cuda.current_stream(self._device), []

        def watched() -> Tensor:
            try:
                return function()
            except BaseException as error:
                raised.append(error)
                raise

        # thread_local: another thread that loads data may go on allocating
        recording = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), recording:
                return watched()
        except BaseException as error:
            torch.cuda.set_stream(before)  # torch up to 2.14 stays on the recording's own where its end fails
            _mend(self._device, self._pool)
            raise (raised or [error])[0] from None  # the end of a recording that failed says less

    def replay(self) -> None:
        self._graph.replay()


def _mend(device: torch.device, pool: Any) -> None:
    """Let a device go on whose recording failed.

    The allocator believes that the recording is still under way, and would not free memory any more; torch's own
    generator (up to 2.11) refuses to draw until a later recording ends well.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError, AttributeError):  # it ended, and only the function raised
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        some = torch.empty(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            some.zero_()


@contextlib.contextmanager
def waiting(device: torch.device) -> Iterator[list[str]]:
    """A block of code whose waits for the device are listed, one line each, once it has ended; none off CUDA.

    What waits is what CUDA's own debug mode knows: numbers that are read, and memory that is sent or fetched while
    the host stands still. None of it can be recorded.
    """
    told: list[str] = []
    if device.type != "cuda":
        yield told
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        said.clear()  # the mode introduces itself
        try:
            yield told
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in said:
        if WAITED in str(warning.message):
            told.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


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
        warm_up(lambda: run(x, *_like(x, noise, tableau)), x.device, each)

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


def warm_up(
    run: Callable[[], Tensor], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
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

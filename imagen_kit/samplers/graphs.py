"""A whole sampling run, network included, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.samplers.base import Generators, begin, gaussian
from imagen_kit.samplers.tableau import Denoise, Tableau

#: Runs before the capture, in which libraries choose their kernels and allocate their workspaces.
WARM_UP = 3


def graphed(
    denoise: Denoise, tableau: Tableau, x: Tensor, generator: Generators | None = None
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

    Returns:
        ``sample(x)``: (b, ...) noisy start -> the sample, a new tensor.

    Raises:
        KitError: a generator of another device, or (when called) x of another shape, dtype or device.
    """
    each: Sequence[torch.Generator] = (
        []
        if generator is None
        else [generator]
        if isinstance(generator, torch.Generator)
        else list(generator)
    )

    def run(start: Tensor) -> Tensor:
        ready = begin(denoise, tableau.times, generator, tableau.plan.parts)
        return tableau.run(ready, start, gaussian(start, generator))

    def check(start: Tensor) -> None:
        if (start.shape, start.dtype, start.device) != (x.shape, x.dtype, x.device):
            raise KitError(
                f"this run was made for x of {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"not {tuple(start.shape)} {start.dtype} on {start.device}"
            )

    if x.device.type != "cuda":

        def plain(start: Tensor) -> Tensor:
            check(start)
            return run(start)

        return plain

    if any(source.device.type != "cuda" for source in each):
        raise KitError("a CUDA graph draws its noise on the device; give generators of the device 'cuda'")
    static = x.clone()
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    states = [source.get_state() for source in each]
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run(static)
    torch.cuda.current_stream(x.device).wait_stream(stream)
    for source, state in zip(each, states, strict=True):  # the warm-up leaves no trace
        source.set_state(state)
    graph = torch.cuda.CUDAGraph()
    for source in each:
        graph.register_generator_state(source)
    with torch.no_grad(), torch.cuda.graph(graph):
        result = run(static)

    def replay(start: Tensor) -> Tensor:
        check(start)
        static.copy_(start)
        graph.replay()
        return result.clone()

    return replay

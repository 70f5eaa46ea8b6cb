"""The steps of a sampler with a network that costs nothing: what is timed is the sampler alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.bench.peers.schedulers import FunctionRun, SchedulerLoop
from imagen_kit.bench.subject import OURS, Built, Subject, Unavailable
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import Work, attempt, chosen_peers
from imagen_kit.errors import KitError, unknown
from imagen_kit.samplers.graphs import graphed

PEERS = ("diffusers", "k_diffusion")
MODES = ("eager", "graph")
POOL = 2**26  # bytes of answers handed over in turn: more than the caches of a device hold


@register("sampler", names=samplers.names)
def sampler(
    name: str,
    device: torch.device,
    *,
    steps: int = 20,
    batch: int = 1,
    channels: int = 4,
    resolution: int = 64,
    mode: str = "eager",
    peers: str = "all",
) -> Built:
    """A whole run of a sampler whose network answers with tensors that are there already.

    Ours ends at the grid's last noisy time, not at zero, where most samplers answer with what the network said
    last: so the results of others tell whether they took the same steps. k-diffusion gets our grid; diffusers'
    schedulers have grids of their own, so their result is not compared here.

    Args:
        name: of the sampler.
        device: where.
        steps: of a run.
        batch, channels, resolution: shape of the state.
        mode: eager, or graph: ours replayed as a CUDA graph.
        peers: all, none, or some of diffusers, k_diffusion, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    wanted = chosen_peers(peers, PEERS)
    if mode not in MODES:
        raise KitError(unknown("mode of a sampler", mode, MODES))
    draw = torch.Generator().manual_seed(0)
    shape = (batch, channels, resolution, resolution)
    options: dict[str, Any] = {"final": "sigma_min"}
    if "lower_order_final" in samplers.describe(name)["options"]:
        options["lower_order_final"] = False  # k-diffusion's functions keep their order to the end
    schedule, chosen = schedules.create("scaled_linear"), samplers.create(name, **options)
    points = chosen.points(schedule, steps)
    x = torch.randn(shape, generator=draw).to(device)
    count = max(1, min(8, POOL // (x.numel() * x.element_size())))
    pool = [torch.randn(shape, generator=draw).to(device) for _ in range(count)]
    generator = torch.Generator(device).manual_seed(0)

    def answers() -> Callable[..., Tensor]:
        given = itertools.cycle(pool)
        return lambda *_, **__: next(given)

    def run() -> Tensor:
        return chosen.sample(answers(), x, schedule, steps, generator=generator)

    def work(function: Callable[[], Tensor], note: str, comparable: bool = True) -> Subject:
        return Work(
            torch.no_grad()(function),
            "steps",
            steps,
            inputs=[x, *pool],
            note=note,
            eager=torch.no_grad()(function if function is not replay else run),
            steps=steps,
            comparable=comparable,
        )

    replay: Callable[[], Tensor] | None = None
    built: Built = {}
    if mode == "graph" and device.type != "cuda":
        built[OURS] = Unavailable(f"mode graph replays a CUDA graph, and this is a {device.type} device")
    elif mode == "graph":
        captured = graphed(answers(), chosen.tableau(schedule, steps), x, generator)
        replay = lambda: captured(x)  # noqa: E731
        built[OURS] = work(replay, "CUDA graph of the run")
    else:
        built[OURS] = work(run, "tableau" if samplers.describe(name)["linear"] else "formula")

    def diffusers() -> Subject:
        loop = SchedulerLoop(name, steps, x, answers, generator)

        def whole() -> Tensor:
            loop.prepare()
            return loop.run()

        return work(whole, f"{type(loop.scheduler).__name__} on a grid of its own", comparable=False)

    def k_diffusion() -> Subject:
        function = FunctionRun(name, points, x, answers)
        return work(function.run, "noise of its own" if function.draws else "our grid", not function.draws)

    for who, build in (("diffusers", diffusers), ("k_diffusion", k_diffusion)):
        if who in wanted:
            built[who] = attempt(build)
    return built

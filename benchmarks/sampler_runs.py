"""What ``benchmarks/samplers.py`` times: one sampler on one shape, run three ways, and what waits for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from imagen_kit import samplers, schedules
from imagen_kit.bench.peers.schedulers import SchedulerLoop
from imagen_kit.samplers.grid import Point

SMALL, LARGE = (1, 4, 8, 8), ((8, 3, 256, 256), (4, 16, 128, 128))
STEPS = {SMALL: 20, LARGE[0]: 10, LARGE[1]: 10}


class EagerRun:
    """A formula's view of a run, computing on tensors step by step: what a tableau saves."""

    def __init__(self, schedule: Any, points: list[Point], denoise: Callable[..., Tensor], noise: Any):
        self.schedule, self.points, self.noise, self._denoise = schedule, points, noise, denoise

    @property
    def steps(self) -> Iterator[tuple[int, Point, Point]]:
        return ((i, now, then) for i, (now, then) in enumerate(itertools.pairwise(self.points)))

    def denoise(self, x: Tensor, at: Point) -> Tensor:
        return self._denoise(x, at.t)

    def step(self, x: Tensor) -> Tensor:
        return x

    keep = step

    def point(self, lam: float) -> Point:
        t = self.schedule.t_of_log_snr(2 * lam)
        return Point(t, *self.schedule.alpha_sigma(t))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for tensors that live on the device, or would on an accelerator.

    Args:
        on_device: the tensors to follow.
    """

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __init__(self, *on_device: Tensor):
        super().__init__()
        self.count = 0
        self._kept = list(on_device)  # alive, so that no other tensor takes their id
        self._ids = {id(tensor) for tensor in on_device}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        given = [item for item in tree_flatten((args, kwargs or {}))[0] if isinstance(item, Tensor)]
        followed = any(id(item) in self._ids or item.is_cuda for item in given)
        self.count += followed and name in self.READS
        self.count += name in ("copy_", "_to_copy") and len({item.device for item in given}) > 1
        out = func(*args, **(kwargs or {}))
        if followed:
            for item in tree_flatten(out)[0]:
                if isinstance(item, Tensor):
                    self._kept.append(item)
                    self._ids.add(id(item))
        return out


class Cell:
    """One sampler on one shape: what there is to time, as functions of no argument."""

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device):
        self.name, self.shape, self.device, self.steps = name, shape, device, STEPS[shape]
        self.schedule = schedules.create("scaled_linear")
        self.sampler = samplers.create(name)
        self.tableau = self.sampler.tableau(self.schedule, self.steps)
        self.points = self.sampler.points(self.schedule, self.steps)
        generator = torch.Generator().manual_seed(0)
        # More answers than fit into a cache, in turn, as a network would hand them over.
        count = 8 if shape != SMALL else 1
        self.pool = [torch.randn(shape, generator=generator).to(device) for _ in range(count)]
        self.generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(shape, generator=generator).to(device)

    def answers(self) -> Callable[..., Tensor]:
        pool = itertools.cycle(self.pool)
        return lambda *_: next(pool)

    def ours(self) -> Tensor:
        return self.sampler.sample(
            self.answers(), self.x, self.schedule, self.steps, generator=self.generator
        )

    def sums(self) -> Tensor:
        """The same with its noise given."""
        give = self.answers()
        return self.tableau.run(give, self.x, give)

    def eager(self) -> Tensor:
        """The formula on tensors, its coefficients computed step by step; the grid is there already."""
        noise = lambda: torch.randn(self.shape, generator=self.generator, device=self.device)  # noqa: E731
        return self.sampler.solve(self.x, EagerRun(self.schedule, self.points, self.answers(), noise))

    def bytes(self) -> int:
        """Read and written by the tableau's rows."""
        each = self.x.numel() * self.x.element_size()
        return each * sum(len(row.weights) + 1 for row in self.tableau.rows if row.computes)

    def copies(self) -> Callable[[], None]:
        """Plain copies, one a row, that read and write as many bytes together."""
        rows = sum(row.computes for row in self.tableau.rows)
        size = self.bytes() // (2 * self.x.element_size() * rows)
        count = max(1, 8 * self.x.numel() // size)
        sources = [torch.zeros(size, device=self.device) for _ in range(count)]
        targets = [torch.zeros(size, device=self.device) for _ in range(count)]

        def run() -> None:
            for i in range(rows):
                targets[i % count].copy_(sources[(i + 1) % count])

        return run


def peer(cell: Cell) -> SchedulerLoop:
    """diffusers' scheduler in the place of one of our samplers; KitError where there is none."""
    return SchedulerLoop(cell.name, cell.steps, cell.x, cell.answers, cell.generator)

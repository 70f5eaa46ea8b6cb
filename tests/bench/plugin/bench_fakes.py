"""Subjects whose truth is known, as another distribution would bring its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from imagen_kit.bench.subject import Built, Subject, Unavailable
from imagen_kit.bench.subjects import register


class Fake(Subject):
    """A function as a subject."""

    def __init__(self, run: Callable[[], Tensor | None], **attributes: object):
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self) -> Tensor | None:
        return self.run()


def matmul(n: int, **_: object) -> Built:
    """Two n×n matrices: 2n³ operations. A peer answers 1 more, one is slower, one is missing."""
    layer = nn.Linear(n, n, bias=False)
    x = torch.randn(n, n)

    @torch.no_grad()
    def run() -> Tensor:
        return layer(x)

    def slow() -> Tensor:
        time.sleep(0.02)
        return run()

    about = {"modules": [layer], "inputs": [x], "units": n}
    return {
        "imagen_kit": Fake(run, **about, note="the work itself"),
        "one more": Fake(lambda: run() + 1, **about),
        "sleeper": Fake(slow, **about),
        "other weights": Fake(lambda: run() + 5, **about, comparable=False),
        "absent": Unavailable("absent is not installed"),
    }


def copy(n: int, **_: object) -> Built:
    """n numbers copied: 8n bytes."""
    x = torch.randn(n)
    return {"imagen_kit": Fake(x.clone, inputs=[x])}


def allocation(n: int, **_: object) -> Built:
    """More memory than any machine has; a peer without this need goes on."""
    return {"imagen_kit": Fake(lambda: torch.empty(2**52)), "modest": Fake(lambda: torch.zeros(n))}


def greedy(n: int, **_: object) -> Built:
    """Raises what CUDA's allocator does, while it is built."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def killed(n: int, **_: object) -> Built:
    """Dies the way the system ends a process when memory runs out."""
    return {"imagen_kit": Fake(lambda: os.kill(os.getpid(), signal.SIGKILL))}


def crash(n: int, **_: object) -> Built:
    """Dies of a segmentation fault."""
    return {"imagen_kit": Fake(lambda: os.kill(os.getpid(), signal.SIGSEGV))}


def leave(n: int, **_: object) -> Built:
    """Leaves without a word to the engine."""

    def run() -> None:
        os.write(2, b"some library gave up\n")
        os._exit(7)

    return {"imagen_kit": Fake(run)}


def wrong(n: int, **_: object) -> Built:
    """Raises an ordinary error."""

    def run() -> Tensor:
        raise ValueError("no such\nthing")

    return {"imagen_kit": Fake(run)}


def late(n: int, **_: object) -> Built:
    """Goes wrong in its sixth call only, when it is being timed."""
    calls = []

    def run() -> Tensor:
        calls.append(1)
        time.sleep(0.006)  # longer than the shortest repeat, so that a repeat is one call
        if len(calls) == 6:
            raise MemoryError
        return torch.zeros(n)

    return {"imagen_kit": Fake(lambda: torch.zeros(n)), "late": Fake(run)}


def talks(n: int, **_: object) -> Built:
    """Prints to the standard output, as libraries do."""
    return {"imagen_kit": Fake(lambda: print("{not json") or torch.zeros(n))}


def stuck(n: int, **_: object) -> Built:
    """Never ends."""
    return {"imagen_kit": Fake(lambda: time.sleep(1000))}


def unlike(n: int, **_: object) -> Built:
    """A peer that answers with another shape."""
    return {"imagen_kit": Fake(lambda: torch.zeros(n)), "longer": Fake(lambda: torch.zeros(n + 1))}


def nothing(n: int, **_: object) -> Built:
    """Cannot be done here."""
    return {"imagen_kit": Unavailable("needs a GPU")}


def loop(n: int, **_: object) -> Built:
    """n steps, each with one look at a number that the device computed, and a quarter of them with two."""
    x = torch.ones(4)

    def run() -> Tensor:
        y = x * 2
        for i in range(n):
            y = y + float(y.sum())
            if i % 4 == 0:
                y.max().item()
        return y

    return {"imagen_kit": Fake(run, inputs=[x], steps=n, unit="steps", units=n)}


FAKES = {
    f.__name__: f
    for f in (
        *(matmul, copy, allocation, greedy, killed, crash, leave, wrong, late, talks, stuck),
        *(unlike, nothing, loop),
    )
}


@register("fake", names=lambda: list(FAKES))
def fake(name: str, device: torch.device, *, n: int = 32, shade: str = "") -> Built:
    """One of them."""
    return FAKES[name](n=n)

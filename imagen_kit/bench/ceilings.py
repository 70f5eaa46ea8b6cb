"""What a machine can do at best: large matrix products of every precision, a large copy.

Measured before anything else with the same library, so that percentages are of what a program can reach and not
of a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.clock import seconds
from imagen_kit.bench.subject import Subject
from imagen_kit.performance.prepacking import prepack

#: Sides of the square matrices, and bytes of the copies.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
COPIES = {"cpu": (2**26, 2**28), "cuda": (2**28, 2**30)}
TINY_SIDES, TINY_COPIES = (128, 256), (2**20,)
#: Seconds for each size, after one call to warm up; a size expected to take this long for one call is left out.
EACH = {"cpu": 0.5, "cuda": 0.1}

Ceilings = dict[str, Any]
Make = Callable[[int, torch.device], Callable[[], Tensor]]


class _Work(Subject):
    """A function as a subject."""

    def __init__(self, run: Callable[[], Tensor]):
        self.run = run

    def __call__(self) -> Tensor:
        return self.run()


def measure(device: torch.device, tiny: bool = False) -> Ceilings:
    """``{"matmul": {precision: {"flops": per second, "side": n}}, "copy": {"bytes": per second, "size": n}}``.

    The best of several sizes. Bytes of a copy count its reading and its writing. Precisions that the device (or
    this torch) has no product for are absent.

    Args:
        device: the one to measure.
        tiny: small sizes only, to try the code path in no time; the numbers then mean little.
    """
    products = {}
    sides = TINY_SIDES if tiny else SIDES[device.type]
    for precision, makes in _products(device).items():
        found_sizes = [_best(device, make, sides, lambda n: 2 * n**3) for make in makes]
        best = max(filter(None, found_sizes), default=None)
        if best is not None:
            products[precision] = {"flops": best[0], "side": best[1]}
    copied = _best(device, _copy, TINY_COPIES if tiny else COPIES[device.type], lambda n: 2 * n)
    found: Ceilings = {"matmul": products}
    if copied is not None:
        found["copy"] = {"bytes": copied[0], "size": copied[1]}
    return found


def _best(
    device: torch.device,
    make: Make,
    sizes: tuple[int, ...],
    work: Callable[[int], int],
) -> tuple[float, int] | None:
    """(work per second, size) of the fastest size; None where it cannot be done at all."""
    best: tuple[float, int] | None = None
    for size in sizes:
        if best is not None and work(size) / best[0] > EACH[device.type] and device.type == "cpu":
            break
        try:
            subject = _Work(make(size, device))
            seconds(subject, device)
            least = _least(subject, device)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):  # not there, or no room for it
            continue
        rate = work(size) / least
        best = max(best, (rate, size)) if best else (rate, size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def _least(subject: Subject, device: torch.device) -> float:
    """The best of the repeats that fit into the time: a ceiling is what was reached undisturbed."""
    began, least = time.perf_counter(), float("inf")
    while True:
        least = min(least, seconds(subject, device, calls=2) / 2)
        if time.perf_counter() - began > EACH[device.type]:
            return least


def _products(device: torch.device) -> dict[str, list[Make]]:
    """The ways in which a product of each precision can be had, of which the best counts."""
    found: dict[str, list[Make]] = {
        "fp32": [_float(torch.float32)],
        "bf16": [_float(torch.bfloat16)],
        "fp16": [_float(torch.float16)],
        "int8": [_int8],
    }
    if device.type == "cuda":
        found |= {"tf32": [_float(torch.float32, tf32=True)], "fp8": [_fp8]}
    if device.type == "cpu":
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            found[precision].append(_packed(dtype))
    return found


def _packed(dtype: torch.dtype) -> Make:
    """By a weight that is packed, as ``imagen_kit.performance.prepacking`` has it."""

    def make(n: int, device: torch.device) -> Callable[[], Tensor]:
        layer = nn.Linear(n, n, bias=False, dtype=dtype).requires_grad_(False)
        prepack(layer)
        a = torch.randn(n, n).to(dtype)
        return lambda: layer(a)

    return make


def _float(dtype: torch.dtype, tf32: bool = False) -> Make:
    def make(n: int, device: torch.device) -> Callable[[], Tensor]:
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))

        def run() -> Tensor:
            if device.type != "cuda" or dtype is not torch.float32:
                return torch.mm(a, b, out=out)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            try:
                return torch.mm(a, b, out=out)
            finally:
                torch.set_float32_matmul_precision(before)

        return run

    return make


def _int8(n: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randint(-128, 127, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def _fp8(n: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    # fast accumulation: what 8-bit networks run with (torchao's default), and the faster
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _copy(size: int, device: torch.device) -> Callable[[], Tensor]:
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)

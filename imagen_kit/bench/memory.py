"""Peak memory of one call beyond what was held before."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from types import TracebackType

import torch

from imagen_kit import allocator
from imagen_kit.evaluation.memory import PeakMemory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel takes for: the peak is the present amount (proc(5))


class Extra:
    """The most memory in use inside the ``with`` block beyond that at its beginning.

    On a GPU the memory of torch's tensors; on a CPU that of the process as the kernel counts it (its mark is set
    back first), or, where that is not allowed, as looked at every 5 ms. Freed memory that the C library keeps is
    given back first, and inside the block it keeps none (see ``imagen_kit.allocator``; on Linux with glibc), so
    that the bytes are those of tensors and of the libraries' own buffers, to about a MiB, however they follow
    one another. What a process occupies with the C library left as it is, is some 60 MiB and more above that.

    Args:
        device: where the work is done.
        apart: on a CPU, whether the C library is told to keep nothing.

    Attributes:
        bytes: at the peak, never negative; None where the system does not tell.
        reserved: what torch's allocator took from the GPU, all subjects together; None on a CPU.
    """

    def __init__(self, device: torch.device, apart: bool = True):
        self.device, self._apart = device, apart
        self.bytes: int | None = None
        self.reserved: int | None = None
        self._before = 0
        self._looked: PeakMemory | None = None
        self._within = contextlib.ExitStack()

    def __enter__(self) -> Extra:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        if self._apart:
            self._within.enter_context(allocator.apart())
        allocator.trim()
        if not _reset_peak():
            self._looked = PeakMemory(self.device).__enter__()
            self._before = self._looked.bytes or 0
        else:
            self._before = _read("VmRSS") or 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        elif self._looked is not None:
            self._looked.__exit__(kind, error, trace)
            peak = self._looked.bytes
        else:
            peak = _read("VmHWM")
        self._within.close()
        self.bytes = None if peak is None else max(0, peak - self._before)


def _read(key: str) -> int | None:
    """A line of the process's status, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _reset_peak() -> bool:
    """Set the kernel's mark of the peak to the present; whether it did."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    peak, now = _read("VmHWM"), _read("VmRSS")
    return peak is not None and now is not None and peak <= now * 1.01

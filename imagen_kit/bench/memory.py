"""Peak memory of one call beyond what was held before."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

from imagen_kit.evaluation.memory import PeakMemory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel takes for: the peak is the present amount (proc(5))


class Extra:
    """The most memory in use inside the ``with`` block beyond that at its beginning.

    On a GPU the memory of torch's tensors; on a CPU that of the process as the kernel counts it (its mark is set
    back first), or, where that is not allowed, as looked at every 5 ms. Freed memory that the C library keeps is
    given back first, so that what the work needs shows.

    Args:
        device: where the work is done.

    Attributes:
        bytes: at the peak, never negative; None where the system does not tell.
        reserved: what torch's allocator took from the GPU, all subjects together; None on a CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.reserved: int | None = None
        self._before = 0
        self._looked: PeakMemory | None = None

    def __enter__(self) -> Extra:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        _trim()
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


def _trim() -> None:
    """Have the C library give back what it keeps of freed memory, where it has such a call (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return

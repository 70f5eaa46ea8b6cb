"""Peak memory of a piece of work."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
INTERVAL = 0.005  # seconds between two looks at a CPU's memory


class PeakMemory:
    """The most memory in use inside the ``with`` block, afterwards in ``bytes``.

    On a GPU what torch's tensors occupied, weights included. On a CPU what the process held in memory,
    libraries included, looked at every 5 ms (the kernel's own peak cannot be set back everywhere): what
    differs between settings of one model is its meaning, not the absolute number.

    Args:
        device: where the work is done.

    Attributes:
        bytes: at the peak; None where the system does not tell.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.bytes: int | None = None
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu" and STATM.exists():
            self._look()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._watcher is not None:
            self._over.set()
            self._watcher.join()
            self._look()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.bytes = max(self.bytes or 0, resident)

"""Energy from the meters that a machine has: NVIDIA's driver for a GPU, RAPL for a CPU's package."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
Meter = Callable[[], float]


def joules(
    run: Callable[[], object], device: torch.device, least: float, meter: Meter | None
) -> float | None:
    """Joules of one call: ``run`` is repeated for at least ``least`` seconds between two readings.

    The whole device is read, its idle power and what others do on it included. None without a meter or with one
    that did not move (a GPU's counts in steps of some ten milliseconds).
    """
    if meter is None or least <= 0:
        return None
    sync = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    sync()
    before, began, calls = meter(), time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < least:
        run()
        sync()
        calls += 1
    used = meter() - before
    return used / calls if used > 0 else None


def find_meter(device: torch.device) -> Meter | None:
    """A function that answers joules since some moment; None where nothing tells."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def _nvml(device: torch.device) -> Meter | None:
    """The counter of NVIDIA's management library, which comes with the driver (Volta and later)."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
        told = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(told, ctypes.byref(handle))
        if failed or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)):
            return None
    except (OSError, AttributeError):
        return None

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used))
        return used.value / 1000  # from millijoules

    return read


def _rapl() -> Meter | None:
    """The counters of all CPU packages together, as the kernel shows them; often to the administrator alone."""
    packages = sorted(path for path in RAPL.glob("intel-rapl:*") if path.name.count(":") == 1)
    try:
        wraps = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        last = [int((path / "energy_uj").read_text()) for path in packages]
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for i, path in enumerate(packages):
            now = int((path / "energy_uj").read_text())
            total += (now - last[i]) % (wraps[i] + 1)  # the counter starts over at its end
            last[i] = now
        return total / 1e6  # from microjoules

    return read

"""Memory, energy and ceilings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from imagen_kit.bench import ceilings, energy, memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("marked", [True, False])
def test_peak_beyond_what_was_held(monkeypatch, tmp_path, marked):
    """With the kernel's mark, and looking where that may not be set back."""
    if not marked:
        monkeypatch.setattr(memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    held = torch.ones(8_000_000)
    with memory.Extra(CPU) as extra:
        for _ in range(4):  # long enough to be looked at
            more = torch.ones(16_000_000)  # 64 MB
            more = more * 2  # and 64 MB beside it
            del more
    # what torch and the C library allocate besides is small; pages are counted by the kernel
    assert extra.bytes == pytest.approx(128e6, rel=0.1)
    assert extra.reserved is None
    assert held[0] == 1


def test_the_mark_is_set_back():
    big = torch.ones(25_000_000)
    del big
    with memory.Extra(CPU) as extra:
        torch.ones(1_000_000)
    assert extra.bytes is not None
    assert extra.bytes < 20e6


def test_energy_of_a_call():
    meter = iter([10.0, 16.0]).__next__
    calls = []
    assert energy.joules(lambda: calls.append(1), CPU, 1e-9, meter) == 6.0
    assert len(calls) == 1


def test_energy_without_a_meter_or_time():
    assert energy.joules(lambda: None, CPU, 1.0, None) is None
    assert energy.joules(lambda: None, CPU, 0.0, lambda: 1.0) is None
    assert energy.joules(lambda: None, CPU, 1e-9, lambda: 1.0) is None  # it did not move


def test_packages_are_added_and_counters_wrap(monkeypatch, tmp_path):
    def write(package, value):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "max_energy_range_uj").write_text("9999999\n")
        (folder / "energy_uj").write_text(f"{value}\n")

    write(0, 9_000_000)
    write(1, 1_000_000)
    write("0:0", 5)  # a part of package 0, in it already
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    read = energy.find_meter(CPU)
    assert read() == 0
    write(0, 1_000_000)  # 10 J later, modulo 10 J: 2 J
    write(1, 1_500_000)
    assert read() == pytest.approx(2.5)
    write(1, 1_600_000)
    assert read() == pytest.approx(2.6)


def test_no_meter_where_the_system_shows_none(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.find_meter(CPU) is None


class Nvml:
    """The driver's library: a GPU by its UUID, an energy in millijoules."""

    def __init__(self, millijoules, known=b"GPU-12ab-34cd"):
        self.readings, self.known = iter(millijoules), known

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, told, handle):
        return 0 if told == self.known else 6  # NVML_ERROR_NOT_FOUND

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, used):
        used._obj.value = next(self.readings)
        return 0


def test_a_gpu_is_read_in_joules_of_its_own(monkeypatch):
    told = SimpleNamespace(uuid="12ab-34cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: Nvml([0, 5_000, 8_000]))
    cuda = torch.device("cuda")
    assert energy.joules(lambda: None, cuda, 1e-9, energy.find_meter(cuda)) == pytest.approx(3.0)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: Nvml([0], known=b"GPU-another"))
    assert energy.find_meter(cuda) is None


def test_ceilings_are_work_over_time(monkeypatch):
    """With a clock of 1 ms a call every rate is known."""
    monkeypatch.setattr(ceilings, "seconds", lambda subject, device, calls=1: (subject(), 1e-3 * calls)[1])
    monkeypatch.setattr(ceilings, "EACH", {"cpu": 1e-9})
    found = ceilings.measure(CPU, tiny=True)
    assert set(found["matmul"]) >= {"fp32", "bf16"}
    assert found["matmul"]["fp32"] == {"flops": pytest.approx(2 * 128**3 / 1e-3), "side": 128}
    assert found["copy"] == {"bytes": pytest.approx(2 * 2**20 / 1e-3), "size": 2**20}


def test_what_a_device_has_not_is_left_out(monkeypatch):
    def none(n, device):
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(ceilings, "_products", lambda device: {"int8": [none]})
    monkeypatch.setattr(ceilings, "EACH", {"cpu": 1e-9})
    assert ceilings.measure(CPU, tiny=True)["matmul"] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_ceilings_of_every_precision():
    found = ceilings.measure(torch.device("cuda"))
    assert {"fp32", "tf32", "bf16", "fp16", "int8"} <= set(found["matmul"])
    assert found["matmul"]["bf16"]["flops"] > found["matmul"]["fp32"]["flops"]
    assert found["copy"]["bytes"] > 1e11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu():
    device = torch.device("cuda")
    with memory.Extra(device) as extra:
        torch.ones(16_000_000, device=device).mul(2)
    assert extra.bytes == pytest.approx(128e6, rel=0.05)
    assert extra.reserved >= extra.bytes

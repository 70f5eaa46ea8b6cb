"""The rule behind ``auto``, on machines of every kind."""

from __future__ import annotations

import pytest
import torch
from networks import make
from torch import nn

from imagen_kit.performance import Performance, automatic, choose
from imagen_kit.performance.automatic import LEAST_FLOPS, machine, multiplies_bf16
from imagen_kit.performance.prepacking import packs

AUTO = Performance(dtype="auto")
CONVOLVES, PATCHES = "unet", "dit"


@pytest.fixture
def cpu(monkeypatch):
    """A CPU that multiplies bfloat16, or does not."""
    return lambda has: monkeypatch.setattr(automatic, "multiplies_bf16", lambda: has)


@pytest.mark.parametrize(
    ("name", "has", "flops", "want"),
    [
        (CONVOLVES, True, LEAST_FLOPS, ("bf16", "channels_last")),
        (CONVOLVES, True, LEAST_FLOPS - 1, ("fp32", "channels_last")),
        (CONVOLVES, False, LEAST_FLOPS, ("fp32", "channels_last")),
        (PATCHES, True, LEAST_FLOPS, ("bf16", "contiguous")),
        (PATCHES, False, 1e15, ("fp32", "contiguous")),
    ],
)
def test_on_a_cpu(cpu, name, has, flops, want):
    cpu(has)
    found = choose(make(name), AUTO, "cpu", flops)
    assert (found.dtype, found.memory_format) == want


@pytest.mark.parametrize("flops", [1.0, LEAST_FLOPS])
def test_the_memory_format_on_a_cpu_stays_as_it_was_made(cpu, flops):
    cpu(True)
    network = make(CONVOLVES)
    network.channels_last = True
    assert choose(network, AUTO, "cpu", flops).memory_format == "channels_last"


@pytest.mark.parametrize(
    ("capability", "name", "want"),
    [
        ((9, 0), CONVOLVES, ("bf16", "channels_last")),
        ((9, 0), PATCHES, ("bf16", "contiguous")),
        ((7, 5), CONVOLVES, ("fp16", "channels_last")),
        ((6, 1), CONVOLVES, ("fp32", "contiguous")),
    ],
)
def test_on_a_gpu(monkeypatch, capability, name, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = choose(make(name), AUTO, "cuda")
    assert (found.dtype, found.memory_format) == want


def test_elsewhere_it_is_float32():
    assert choose(make(CONVOLVES), AUTO, "mps", 1e15).dtype == "fp32"


def test_what_is_said_is_kept(cpu):
    cpu(True)
    told = Performance(dtype="fp32", memory_format="contiguous", compile="blocks")
    assert choose(make(CONVOLVES), told, "cpu", 1e12) == told
    assert choose(make(CONVOLVES), Performance(), "cpu", 1e12) == Performance()
    last = Performance(dtype="auto", memory_format="contiguous")
    want = Performance(dtype="bf16", codec_dtype="bf16", memory_format="contiguous", prepack=packs() or None)
    assert choose(make(CONVOLVES), last, "cpu", 1e12) == want
    told = Performance(dtype="auto", codec_dtype="fp32", prepack=False)
    assert choose(make(CONVOLVES), told, "cpu", 1e12) == Performance(
        dtype="bf16", codec_dtype="fp32", memory_format="channels_last"
    )


def test_unknown_operations_are_guessed_from_the_weights(cpu):
    cpu(True)
    assert choose(make(PATCHES), AUTO, "cpu").dtype == "fp32"  # some 0.2 M weights at 256 places
    with torch.device("meta"):
        large = nn.Linear(2000, 2000)
    assert choose(large, AUTO, "cpu").dtype == "bf16"  # 4 M


@pytest.mark.parametrize(
    ("flags", "system", "want"),
    [
        ("fpu avx512f avx512_bf16", "x86_64", True),
        ("fpu amx_tile amx_bf16", "x86_64", True),
        ("fpu avx2", "x86_64", False),
        ("bf16", "aarch64", False),  # not measured there
    ],
)
def test_what_a_cpu_has(monkeypatch, tmp_path, flags, system, want):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(automatic, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(automatic.platform, "machine", lambda: system)
    assert multiplies_bf16.__wrapped__() is want


def test_a_machine_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(automatic, "Path", lambda _: tmp_path / "nothing")
    assert multiplies_bf16.__wrapped__() is False


def test_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine("cpu") == "cpu, 2 threads"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine(torch.device("cpu")) == "cpu, 1 thread"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert machine("cuda:0") == "cuda, NVIDIA H200"
    assert machine("mps") == "mps"

"""What ``auto`` stands for: a rule from measurement, so that it is never slower than float32.

On a GPU: bfloat16 from compute capability 8.0, float16 from 7.0, and channels last with it where a network
convolves; float32 as the network was made on others.

On a CPU that multiplies bfloat16 itself (avx512_bf16 or amx; emulated it is several times slower): bfloat16 where an
evaluation of one picture is at least 1 GFLOP. Below that the conversions around its products cost what they save.
The weights of linear layers are packed there (``prepacking``), unless the network is compiled or quantised, and
networks that convolve run channels last.

Measured on an EPYC with avx512_bf16, torch 2.15, weights packed; two threads but for the first table.
Time in float32 over that in bfloat16, one picture and two, one thread:

    network, side           GFLOP a picture
    U-Net 32-64, 16 px      0.12              0.81  0.96
    U-Net 64-128, 16 px     0.46              1.07  1.17
    U-Net 64-128, 32 px     1.9               1.31  1.42
    U-Net 32-64, 64 px      2.9               1.14  1.31
    U-Net 128-256, 32 px    7.5               1.60  1.74
    DiT 128×6, 16 px        0.17              0.94  1.04
    DiT 128×6, 32 px        0.81              1.12  1.18
    DiT 192×6, 32 px        1.7               1.28  1.35

Time channels first over that of channels last:

    network, side                        pictures      float32                 bfloat16
    ADM 64-128, 32 px                    1, 2, 4, 8    0.99  1.03  1.04  1.06  1.04  1.04  1.03  1.04
    DDPM for CIFAR-10                    1, 2, 4, 8    0.97  0.96  1.05  1.06  0.99  0.98  1.00  1.02
    Stable Diffusion 1.5's, 32 × 32      2             1.07                    1.07
    of its kind, 64-128-256, 32 × 32     2, 8          1.00  1.00              1.02  1.01
    of DeepFloyd IF's kind, 64 px        2, 8          1.06  1.09              1.06  1.06
    the pocket model's two               1, 4          1.04  1.00              1.04  1.04

Compiling is left to those who ask for it: it wins a factor of 1.1 to 1.6 more there but takes 10 to 40 s.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from imagen_kit.performance.layout import convolves
from imagen_kit.performance.options import Performance
from imagen_kit.performance.prepacking import packs

#: Floating-point operations of an evaluation of one picture from which on bfloat16 is faster on such a CPU.
LEAST_FLOPS = 1e9
ASSUMED_PLACES = 256  # at which a weight is used, where the operations are not known: a grid of 16 × 16
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def choose(
    module: nn.Module, performance: Performance, device: torch.device | str, flops: float | None = None
) -> Performance:
    """``performance`` with ``auto`` resolved; what else it decides goes with ``dtype: auto``.

    Args:
        module: the network.
        performance: the choices.
        device: where it is to run.
        flops: of its evaluation of one picture, a multiply-add being two; estimated from its weights if None.
    """
    device = torch.device(device)
    dtype, memory_format, prepack = performance.dtype, performance.memory_format, performance.prepack
    if flops is None:
        flops = 2.0 * ASSUMED_PLACES * sum(p.numel() for p in module.parameters())
    if dtype == "auto":
        dtype = _dtype(device, flops)
        memory_format = memory_format or "auto"
        if prepack is None:
            prepack = performance.compile == "off" and performance.quantise == "off"
    codec_dtype = performance.codec_dtype or ("auto" if performance.dtype == "auto" else None)
    if codec_dtype == "auto":
        codec_dtype = "bf16" if dtype == "bf16" else "fp32"
    packs_here = bool(prepack) and device.type == "cpu" and packs()
    if memory_format == "auto":
        last = device.type == "cpu" or (device.type == "cuda" and dtype in ("bf16", "fp16"))
        as_made = "channels_last" if getattr(module, "channels_last", False) else "contiguous"
        memory_format = "channels_last" if last and convolves(module) else as_made
    return replace(
        performance,
        dtype=dtype,
        codec_dtype=codec_dtype,
        memory_format=memory_format,
        prepack=packs_here or None,
    )


def _dtype(device: torch.device, flops: float) -> str:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    return "bf16" if device.type == "cpu" and multiplies_bf16() and flops >= LEAST_FLOPS else "fp32"


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products. Told by Linux alone; False elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return platform.machine() in ("x86_64", "AMD64") and bool(BF16_FLAGS & set(flags))


def machine(device: torch.device | str) -> str:
    """The device in words: ``cpu, 2 threads`` or ``cuda, NVIDIA H200``."""
    device = torch.device(device)
    if device.type == "cpu":
        count = torch.get_num_threads()
        return f"cpu, {count} thread{'s' * (count != 1)}"
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return device.type

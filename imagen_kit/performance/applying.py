"""Carrying out how a network is run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from imagen_kit.performance.attending import attend_by
from imagen_kit.performance.automatic import choose, machine
from imagen_kit.performance.compiling import compile_blocks, compile_seconds, compile_whole, uncompile
from imagen_kit.performance.layout import lay_out
from imagen_kit.performance.options import Performance
from imagen_kit.performance.precision import lower
from imagen_kit.performance.prepacking import prepack, unpack
from imagen_kit.performance.quantising import quantise

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Applied:
    """What was done to a network.

    Attributes:
        module: the network.
        chosen: the choices, ``auto`` resolved.
        device: where it runs.
    """

    module: nn.Module = field(repr=False)
    chosen: Performance
    device: torch.device

    @property
    def words(self) -> str:
        """What was chosen, with the device: ``cpu, 2 threads: bf16 channels-last eager``."""
        return f"{machine(self.device)}: {self.chosen.brief()}"

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling the network so far: none before it is first called."""
        return compile_seconds(self.module)


def apply_to_codec(codec: nn.Module, chosen: Performance, device: torch.device | str = "cpu") -> None:
    """Make the codec of a stage run as was chosen for the stage, in place: ``codec_dtype`` and ``prepack``.

    Args:
        codec: its weights loaded.
        chosen: ``Applied.chosen`` of the stage's network.
        device: where it is to run.
    """
    unpack(codec)
    codec.to(device)
    if chosen.codec_dtype is not None:
        codec.to(TORCH[chosen.codec_dtype])
    if chosen.prepack:
        prepack(codec)


def apply(
    module: nn.Module,
    performance: Performance,
    device: torch.device | str = "cpu",
    flops: float | None = None,
) -> Applied:
    """Make a network run as chosen, in place.

    In this order: the precision (``precision.lower``), the move to the device, the layout, quantisation, the
    packing, the attention kernel, compilation. May be called again with other choices, but for quantisation, which
    stays.

    Args:
        module: the network, its weights loaded.
        performance: the choices.
        device: where it is to run.
        flops: of its evaluation of one picture, for ``auto``; see ``choose``.

    Raises:
        KitError: what this machine or this network does not offer.
    """
    chosen, device = choose(module, performance, device, flops), torch.device(device)
    uncompile(module)
    unpack(module)
    attend_by(module, chosen.attention)
    if chosen.dtype is not None:
        lower(module, TORCH[chosen.dtype])
    module.to(device)
    if chosen.memory_format is not None:
        lay_out(module, chosen.memory_format)
    if chosen.quantise != "off":
        quantise(module, chosen.quantise, device)
    if chosen.prepack and not prepack(module):
        chosen = replace(chosen, prepack=None)  # no layer is large enough
    if chosen.compile == "blocks":
        compile_blocks(module)
    elif chosen.compile == "whole":
        compile_whole(module)
    return Applied(module, chosen, device)

"""What a recipe holds in memory at its fullest moment, beside the least that its operations need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from imagen_kit.bench.floor import measure
from imagen_kit.bench.subject import Built, Subject
from imagen_kit.bench.subjects import register
from imagen_kit.bench.subjects.recipe import PEERS, build
from imagen_kit.bench.systems import Asked, Settings, System
from imagen_kit.bench.work import chosen_peers


@register("memory")
def memory(
    name: str,
    device: torch.device,
    *,
    size: str = "full",
    set: Sequence[str] = (),
    stages: int | None = None,
    sampler: str | None = None,
    steps: int = 2,
    guidance: float | None = None,
    batch: int = 1,
    dtype: str = "fp32",
    performance: Mapping[str, Any] | None = None,
    peers: str = "diffusers",
) -> Built:
    """Drawing a batch of pictures, as in ``recipe``, for the peak that the row tells and how far it is above the least.

    Two numbers are measured for that, operation by operation, and stand in the row's ``floor`` with the peak over
    each. The largest activation: the most bytes, weights left out, that a single operation reads and writes; what
    waits meanwhile (a U-Net's skip connections, a residual branch) is not in it. And what is alive at once: what
    was made by then and is still to be read, at the fullest moment, each tensor counted until its last use;
    without fusing operations, writing in place or doing them again nobody who does them in this order needs less.

    Args:
        name, size, set, stages, sampler, guidance, batch, dtype, performance: see ``recipe``.
        device: where.
        steps: of every stage; more make no difference to memory.
        peers: all, none, or some of diffusers, diffusers compiled, separated by commas.

    Raises:
        KitError: a value that there is not.
    """
    wanted = chosen_peers(peers, PEERS)
    asked = Asked(name, size, tuple(set), stages, "random", performance)
    settings = Settings(sampler, steps, guidance, batch, dtype)
    built = build(System(asked, settings, device), wanted)
    for subject in built.values():
        if isinstance(subject, Subject):
            weights = (tensor for module in subject.modules for tensor in _tensors(module))
            subject.floor = measure(subject.eager, device, weights)
            subject.note += f"; largest activation in {subject.floor.operation}"
    return built


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]

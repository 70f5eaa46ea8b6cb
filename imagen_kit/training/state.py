"""What a training run keeps between steps, and how it survives a kill at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError

CHECKPOINT = "checkpoint.pt"


class Ema:
    """Exponential moving average of a module's parameters, kept in float32, with a warm-up.

    decay_k = min(decay, (1 + k) / (10 + k)), so that early averages forget the initial weights.
    Buffers are copied as they are.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = [], []
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.shadow[key])
                current.append(value.detach())
            else:
                self.shadow[key].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint so that a kill leaves either the old one or the new one, never half of one."""
    partial = folder / (CHECKPOINT + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / CHECKPOINT)


def load(folder: Path) -> dict[str, Any]:
    """Read a checkpoint written by ``save``, to the CPU.

    Raises:
        KitError: there is none, or it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise KitError(f"nothing to resume: {path} does not exist; start without --resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise KitError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); start without --resume"
        ) from error

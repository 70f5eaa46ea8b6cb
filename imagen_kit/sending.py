"""Numbers that are made on the host and wanted on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for what a GPU is still doing.

    Memory that is not pinned is copied while the host stands still, behind all work that was asked for before.
    Pinned memory is copied when its turn comes, and torch keeps it until then.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

"""Real networks in small whose layers guidance changes."""

from __future__ import annotations

import torch

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond

LEVELS = [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": True}]
TEXT = 16


def network(name: str) -> torch.nn.Module:
    """A U-Net or DiT in float64 with random weights everywhere (some start at zero)."""
    options = {"unet": {"levels": LEVELS, "head_dim": 16}, "dit": {"width": 32, "depth": 3, "heads": 2}}[name]
    module = denoisers.create(name, context_dim=TEXT, **options).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(batch: int = 2) -> tuple[torch.Tensor, Cond, Cond]:
    """x (b, 3, 8, 8), a text of three tokens (the last of the second sample masked), no text."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randn(2, batch, 3, TEXT, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[-1, -1] = False
    return (
        x,
        Cond(tokens=tokens[0] * mask[..., None], mask=mask),
        Cond(tokens=tokens[1, :, :1], mask=mask[:, :1]),
    )

"""Small networks of every architecture, no weight of which is degenerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond

LEVELS = [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": True}]
WIDE = {"width": 64, "heads": 2, "in_channels": 4}
TEXT = {"context_dim": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "unet": {"levels": LEVELS, "head_dim": 16, **TEXT},
    "adm": {"levels": [{"channels": 32}, {"channels": 32, "attention": {"head_dim": 16}}]},
    "dit": {**WIDE, "depth": 3, "num_classes": 10},
    "pixart": {**WIDE, "depth": 3, **TEXT},
    "mmdit": {**WIDE, "depth": 3, **TEXT, "details": {"grid": 8}},
    "flux": {**WIDE, "depth": 2, "single_depth": 2, **TEXT},
    "uvit": {**WIDE, "depth": 4, **TEXT},
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, each layer keeping the variance of what it reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = denoisers.create(name, **OPTIONS[name]).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=g)
        p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.1 * noise)
    return module


def inputs(name: str, side: int = 8, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Cond]:
    """x, t and conditioning for the network."""
    g = torch.Generator().manual_seed(seed)
    options = OPTIONS[name]
    x = torch.randn(batch, options.get("in_channels", 3), side, side, generator=g)
    text = "context_dim" in options
    cond = Cond(
        tokens=torch.randn(batch, 5, 32, generator=g) if text else None,
        mask=(torch.arange(5)[None] < torch.tensor([[5], [3]])[:batch]) if text else None,
        labels=torch.arange(batch) if "num_classes" in options else None,
    )
    return x, torch.linspace(0.2, 0.9, batch), cond


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())

"""Networks that caches are tried on: real ones in small, and one whose every number is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from imagen_kit import denoise_fn, denoisers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.inner import run_blocks

FLOW = schedules.create("flow")
TEXT = {"context_dim": 8}
TRANSFORMER = {"width": 32, "depth": 4, "heads": 2}
LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 32, "blocks": 2, "attention": True}]
NETWORKS = {
    "dit": {**TRANSFORMER, **TEXT},
    "pixart": {**TRANSFORMER, **TEXT},
    "mmdit": {**TRANSFORMER, **TEXT, "details": {"grid": 8, "dual_layers": [0]}},
    "flux": {"width": 32, "depth": 2, "single_depth": 2, "heads": 2, **TEXT},
    "uvit": {**TRANSFORMER, **TEXT, "details": {"grid": 4}},
    "unet": {"levels": LEVELS, "head_dim": 16, **TEXT},
    "adm": {"levels": [LEVELS[0], {**LEVELS[1], "attention": {"head_dim": 16}}], **TEXT},
    "efficient_unet": {"levels": [LEVELS[0], {**LEVELS[1], "attention": {"heads": 2}}], **TEXT},
    "edm2": {"in_channels": 3, "levels": LEVELS, "head_dim": 16},
}


def dtype(name: str) -> torch.dtype:
    """float64, but for edm2, which normalises in float32."""
    return torch.float32 if name == "edm2" else torch.float64


def network(name: str, **options) -> nn.Module:
    """A small one with random weights everywhere (some start at zero)."""
    module = denoisers.create(name, **{**NETWORKS[name], **options}).to(dtype(name)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(name: str, batch: int = 3) -> tuple[Tensor, Cond]:
    """x (b, 3, 8, 8) and a text of three tokens, where the network reads text."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randn(batch, 3, 8, generator=generator, dtype=torch.float64).to(dtype(name))
    mask = torch.ones(batch, 3, dtype=torch.bool)
    return x.to(dtype(name)), Cond() if name == "edm2" else Cond(tokens=tokens, mask=mask)


class Known(nn.Module):
    """Two blocks: x + outer(t, label), then + rest(t, label). Says how many samples its second block has seen."""

    def __init__(self, rest: Callable[[Tensor, Tensor], Tensor], outer: Callable | None = None):
        super().__init__()
        self.rest, self.outer = rest, outer or (lambda t, label: torch.ones_like(t))
        self.rows: list[int] = []

    shares = (0.5,)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        def block(i: int, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            if i:
                self.rows.append(len(x))
            return x + (self.rest if i else self.outer)(t, label).reshape(-1, 1, 1)

        t = t.double()  # times come in float32
        label = torch.zeros_like(t) if cond is None else cond.labels.double()
        return run_blocks(block, 2, x.flatten(2), (t, label)).reshape(x.shape)


def answers(module, times, cache=None, x=None, cond=None, grid=None, **options) -> list[Tensor]:
    """The raw answers of a run at these times, to the same x."""
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64) if x is None else x
    denoise = denoise_fn(module, FLOW, "x0", cond=cond, cache=cache, **options).begin(
        times if grid is None else grid
    )
    return [denoise(x, t) for t in times]

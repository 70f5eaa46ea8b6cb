"""Magnitude-preserving layers: what goes in with unit variance comes out with unit variance.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 2 and appendix B.

Axes: b batch, c channels, h w picture, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-4


def unit(x: Tensor, dims: list[int]) -> Tensor:
    """x over its root mean square along ``dims`` (the norms in float32, plus 1e-4)."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    rms = norm * math.sqrt(norm.numel() / x.numel()) + EPS
    return x / rms.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square 0.596 for normal x (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight)·a + weight·b, of unit variance where a and b are so and uncorrelated (eq. 88)."""
    return torch.lerp(a, b, weight) / math.hypot(1 - weight, weight)


def mp_cat(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Channels of a and b, with shares (1 - weight) and weight of the magnitude whatever their numbers (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - weight) ** 2 + weight**2))
    return torch.cat([a * (scale * (1 - weight) / math.sqrt(n)), b * (scale * weight / math.sqrt(m))], dim=1)


class MPFourier(nn.Module):
    """√2·cos(x·freqs + phases) with random frequencies 2π·N(0, 1) and phases (eq. 75).

    The buffers stay in float32 whatever the module is cast to: rounded frequencies would be others.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MPFourier:
        freqs, phases = self.freqs, self.phases
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:
            self.freqs, self.phases = freqs.to(self.freqs.device), phases.to(self.phases.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(b,) → (b, d), float32."""
        return torch.cos(torch.outer(x.float(), self.freqs) + self.phases) * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution, or with ``side`` 0 a linear layer, whose weight is brought to unit norm each time (eq. 47).

    No bias. ``gain`` scales the weight, so that what follows need not.
    """

    def __init__(self, channels: int, out_channels: int, side: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, *[side] * (2 if side else 0)))

    @torch.no_grad()
    def normalize(self) -> None:
        """Bring the stored weight itself to unit variance: forced weight normalisation (eq. 66)."""
        # past the version counter: a graph that still holds the weight keeps its gradient, as the direction stays
        self.weight.data.copy_(unit(self.weight.float(), list(range(1, self.weight.ndim))))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(b, c, h, w) → (b, out, h, w), or (b, c) → (b, out)."""
        weight = self.weight.float()
        weight = unit(weight, list(range(1, weight.ndim))) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

"""Embeddings of numbers and places: times, noise levels, positions in a picture.

Axes: b batch, d width, h w picture, n tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10_000.0, *, shift: float = 0.0, sin_first: bool = False
) -> Tensor:
    """Sinusoidal embedding of times (b,) → (b, dim), [cos | sin], float32.

    Frequencies max_period^(-i / (dim/2 - shift)), i = 0 … dim/2 - 1 (Ho et al. 2020); ``shift`` is 0 in the
    ADM and DiT code bases and 1 in the original DDPM, which also puts the sines first.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    waves = [torch.cos(angles), torch.sin(angles)]
    embedding = torch.cat(waves[::-1] if sin_first else waves, dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """Linear–SiLU–Linear on the sinusoidal embedding of ``scale · t``.

    Args:
        dim: width of the result.
        frequencies: width of the sinusoidal embedding.
        scale: brings native times to the customary 0…1000.
        shift, sin_first: of the sinusoids, see ``timestep_embedding``.
        activation: between the two layers; SiLU by default.
    """

    def __init__(
        self,
        dim: int,
        frequencies: int = 256,
        scale: float = 1.0,
        shift: float = 0.0,
        sin_first: bool = False,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.frequencies, self.scale, self.shift, self.sin_first = frequencies, scale, shift, sin_first
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), activation or nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(b,) → (b, dim)."""
        embedding = timestep_embedding(
            t * self.scale, self.frequencies, shift=self.shift, sin_first=self.sin_first
        )
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))


class PictureCoordinates(nn.Module):
    """Fourier features of relative positions, projected: tells attention where in the picture a cell lies.

    Features are sin and cos of pi k x and pi k y, k = 1 … octaves, at cell centres x, y in (0, 1), so that the
    same weights serve every resolution and aspect ratio.
    """

    def __init__(self, dim: int, octaves: int = 8):
        super().__init__()
        self.octaves = octaves
        self.project = nn.Linear(4 * octaves, dim, bias=False)

    def forward(self, h: int, w: int) -> Tensor:
        """(h·w, dim)."""
        weight = self.project.weight
        y = (torch.arange(h, device=weight.device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=weight.device, dtype=torch.float32) + 0.5) / w
        k = math.pi * torch.arange(1, self.octaves + 1, device=weight.device, dtype=torch.float32)
        fy, fx = y[:, None] * k, x[:, None] * k
        fy = torch.cat([fy.sin(), fy.cos()], 1)[:, None].expand(h, w, -1)
        fx = torch.cat([fx.sin(), fx.cos()], 1)[None].expand(h, w, -1)
        return self.project(torch.cat([fy, fx], -1).reshape(h * w, -1).to(weight.dtype))

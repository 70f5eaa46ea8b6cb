"""Convolutional and attention blocks of the U-Nets.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width, a heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit import fresh
from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.denoisers.layers.context import Context, TextReader
from imagen_kit.denoisers.layers.embeddings import PictureCoordinates
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture
from imagen_kit.denoisers.layers.pictures import grown, modulated
from imagen_kit.errors import KitError, unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
FRESH: dict[str, Callable[[Tensor], Tensor]] = {"silu": fresh.silu, "gelu": fresh.gelu}
MODULATIONS = ("scale_shift", "shift")
RESAMPLES = ("narrowing", "conv", "asymmetric", "residual")


@dataclass(frozen=True)
class Style:
    """How the blocks of one U-Net are made; the defaults are this project's own.

    Attributes:
        activation: ``silu`` or ``gelu``.
        modulation: ``scale_shift``: the embedding scales and shifts the second norm (ADM, Imagen); ``shift``: it
            is added before that norm (DDPM, Stable Diffusion).
        groups: of every GroupNorm; None lets ``group_norm`` choose.
        eps: of every GroupNorm.
        skip_scale: factor on the sum of a residual block and its shortcut (0.7071 in IF's second stage).
        resample: between levels. ``conv``: a strided convolution down; nearest neighbours and a convolution up.
            ``narrowing``: the same, but the convolution up goes to the finer level's width at once.
            ``asymmetric``: ``conv`` whose strided convolution pads right and below only (DDPM). ``residual``: a
            residual block that resamples inside both branches (ADM's ``resblock_updown``).

    Raises:
        KitError: a value that is none of these.
    """

    activation: str = "silu"
    modulation: str = "scale_shift"
    groups: int | None = None
    eps: float = 1e-5
    skip_scale: float = 1.0
    resample: str = "narrowing"

    def __post_init__(self) -> None:
        choices = {"activation": ACTIVATIONS, "modulation": MODULATIONS, "resample": RESAMPLES}
        for field, names in choices.items():
            if getattr(self, field) not in names:
                raise KitError(unknown(f"U-Net {field}", getattr(self, field), names))

    def norm(self, channels: int, eps: float | None = None) -> nn.GroupNorm:
        """The GroupNorm of this style; KitError where its groups do not divide the channels."""
        if self.groups is None:
            return group_norm(channels)
        if channels % self.groups:
            raise KitError(f"U-Net of {channels} channels: norm groups {self.groups} must divide them")
        return PictureNorm(self.groups, channels, eps=self.eps if eps is None else eps)

    def activate(self, x: Tensor) -> Tensor:
        """The activation, element by element."""
        return ACTIVATIONS[self.activation](x)

    def activate_fresh(self, x: Tensor) -> Tensor:
        """The same of a tensor that nobody else holds; see ``imagen_kit.fresh``."""
        return FRESH[self.activation](x)


class PictureNorm(nn.GroupNorm):
    """GroupNorm of a picture (b, c, h, w), by way of the other order of memory where that is faster.

    In bfloat16 and channels last a CPU's kernel for less than 1024 cells works through groups of few channels number by
    number. Its time over that of turning the picture, its norm and turning it back, one thread of an EPYC, torch 2.15:

        channels, groups of    128, 4      256, 8      320, 10    640, 20    1280, 40
        bfloat16               4.0 to 11   1.9 to 3.2  2.4        1.2        0.7
        float32                0.6 to 1.4  0.4 to 0.5  0.5        0.5        0.2
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        if not self._turns(x):
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)

    def _turns(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == torch.bfloat16
            and x.ndim == 4
            and x.shape[2] * x.shape[3] < 1024
            and self.num_channels <= 16 * self.num_groups
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last)
        )


OWN = Style()


def group_norm(channels: int, largest: int = 32) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels where the width allows."""
    groups = next(g for g in range(min(largest, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return PictureNorm(groups, channels)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with its weights set to zero, so that a residual branch starts silent."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """GroupNorm–activation–conv twice with a residual path; the embedding modulates the second norm.

    h = conv2(act(norm(h)·(1 + scale) + shift)), scale, shift = linear(act(emb)) (Dhariwal & Nichol 2021), or
    h = conv2(act(norm(h + linear(act(emb))))) (Ho et al. 2020).

    Args:
        channels, out_channels: widths before and after.
        embed_dim: width of the embedding.
        dropout: before the second convolution.
        style: of the network.
        resample: ``down`` halves the picture inside both branches, ``up`` doubles it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embed_dim: int,
        dropout: float = 0.0,
        style: Style = OWN,
        resample: str | None = None,
    ):
        super().__init__()
        self.style, self.resample = style, resample
        self.norm1 = style.norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed_dim, (2 if style.modulation == "scale_shift" else 1) * out_channels)
        self.norm2 = style.norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.is_residual = channels == out_channels and resample is None and style.skip_scale == 1.0

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return grown(x) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(b, c, h, w), activated embedding (b, e) → (b, out, h', w'); ``size`` is what ``Grow`` needs."""
        h, x = self._resized(self.style.activate_fresh(self.norm1(x))), self._resized(x)
        h = self.conv1(h)
        modulation = self.embed(emb)[:, :, None, None]
        if self.style.modulation == "shift":
            h = self.norm2(fresh.add(h, modulation))
        else:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h)  # a line of its own: what was normalised is free then
            h = modulated(h, scale, shift)
        h = self.dropout(self.style.activate_fresh(h))
        h = self.conv2(h)
        out = fresh.add(h, self.skip(x))
        return out if self.style.skip_scale == 1.0 else out * self.style.skip_scale


class Shrink(nn.Conv2d):
    """Strided convolution to half the side (rounded up; down where the padding is asymmetric)."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(b, c, h, w) → (b, c, h/2, w/2); the embedding, which a ``ResBlock`` reads here, is not needed."""
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Grow(nn.Conv2d):
    """Nearest neighbours to the size of the next skip connection, then a convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """(b, c, h, w) → (b, out, *size)."""
        return super().forward(grown(x, size))


class AttentionBlock(TextReader):
    """Attention over the picture's cells whose keys and values are joined by those of the text, then an MLP.

    Imagen's base and 64→256 models: K = [text, cells], V likewise, in one softmax. Without places and MLP it is
    the block of ADM and DDPM (no text) and of DeepFloyd IF.

    Args:
        channels: width.
        head_dim: width of a head.
        context_dim: width of adapted text tokens; None for a block without text.
        expansion: hidden width of the MLP over ``channels``; 0 leaves the MLP out (as in ADM).
        places: tell the cells apart by their place in the picture.
        norm: of the cells; ``group_norm`` by default.
        context_norm: GroupNorm of the text, whose statistics run over the token axis (IF); None for none.
        cells: whether cells attend to each other; False leaves the text as the only keys (IF's second stage).
    """

    is_residual = True  # these marks are read by guidance that changes layers

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        context_dim: int | None = None,
        expansion: int = 2,
        *,
        places: bool = True,
        norm: nn.Module | None = None,
        context_norm: nn.GroupNorm | None = None,
        cells: bool = True,
    ):
        super().__init__()
        self.head_dim, self.cells = head_dim, cells
        self.is_self_attention = cells
        self.norm = group_norm(channels) if norm is None else norm
        self.places = PictureCoordinates(channels) if places else None
        self.qkv = nn.Linear(channels, 3 * channels if cells else channels)
        self.context_norm = context_norm
        self.context = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.reads_text = context_dim is not None
        self.out = zeroed(nn.Linear(channels, channels))
        self.mlp = None
        if expansion:
            hidden = expansion * channels
            self.mlp = nn.Sequential(
                nn.LayerNorm(channels),
                LinearGelu(channels, hidden),
                nn.Identity(),  # where the GELU was when saved models were numbered
                zeroed(nn.Linear(hidden, channels)),
            )

    def forward(self, x: Tensor, context: Context = None, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w), text (b, n, d) or its keys and values, mask (b, n) bool → (b, c, h, w)."""
        h, w = x.shape[-2:]
        cells = to_cells(x)
        normed = to_cells(self.norm(x)).contiguous()  # else its product and the bias take two operations
        if self.places is not None:
            normed = normed + self.places(h, w)
        q, *own = split_heads(self.qkv(normed), 3 if self.cells else 1, self.head_dim)
        k, v, mask = self._keys(own, context, mask)
        cells = cells + self.out(join_heads(attention(q, k, v, mask)))
        if self.mlp is not None:
            cells = cells + self.mlp(cells)
        return to_picture(cells, h, w)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of text (b, n, d): two of (b, a, n, d)."""
        assert self.context is not None
        if self.context_norm is not None:
            text = self.context_norm(text.transpose(1, 2)).transpose(1, 2)
        k, v = split_heads(self.context(text), 2, self.head_dim)
        return k, v

    def _keys(
        self, own: list[Tensor], context: Context, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (b, a, n + h·w, d) of the text and then of the cells, mask (b, n + h·w)."""
        if self.context is None or context is None:
            k, v = own
            return k, v, None
        tk, tv = context if isinstance(context, tuple) else self.keys_values(context)
        if not own:
            return tk, tv, mask
        k, v = own
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(k), k.shape[2])], dim=1)
        return torch.cat([tk, k], dim=2), torch.cat([tv, v], dim=2), mask

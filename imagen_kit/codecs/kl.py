"""The KL autoencoders of latent diffusion (Rombach et al. 2022, §3.1): Stable Diffusion 1 to 3, SDXL, FLUX.

Axes: b batch, c channels, h w picture, z latent channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit import fresh
from imagen_kit.attention import attention
from imagen_kit.codecs import register
from imagen_kit.denoisers.layers.blocks import PictureNorm
from imagen_kit.errors import KitError

_LOGVAR = (-30.0, 20.0)  # the range the official code clamps to
#: Numbers of an activation from which on a CPU is no faster with more: one by one took 0.95 to 1.05 of the time.
_ENOUGH = 2**19


class ResBlock(nn.Module):
    """Norm–SiLU–convolution twice, beside a shortcut."""

    def __init__(self, inside: int, out: int, groups: int):
        super().__init__()
        self.norm1 = _norm(inside, groups)
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
        self.norm2 = _norm(out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inside, out, 1) if inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, inside, h, w) → (b, out, h, w)."""
        h = self.conv1(fresh.silu(self.norm1(x)))
        h = fresh.silu(self.norm2(h))
        h = self.conv2(h)  # what it read is free before the shortcut is made
        return fresh.add(h, x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention of one head over all cells, beside the identity."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.norm = _norm(dim, groups)
        self.q = nn.Conv2d(dim, dim, 1)
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # b 1 h·w c
        return x + self.proj_out(attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[-2:]))


class Middle(nn.Module):
    """Residual block, attention over the whole picture, residual block."""

    def __init__(self, dim: int, groups: int, attend: bool):
        super().__init__()
        self.block_1 = ResBlock(dim, dim, groups)
        self.attn_1 = AttnBlock(dim, groups) if attend else nn.Identity()
        self.block_2 = ResBlock(dim, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Strided convolution; the padding is all on the right and below, as the official code has it."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution and, where another follows, the step to it."""

    def __init__(self, inside: int, out: int, blocks: int, groups: int, resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inside if j == 0 else out, out, groups) for j in range(blocks))
        self.downsample = Downsample(out) if resample == "down" else None
        self.upsample = Upsample(out) if resample == "up" else None

    @property
    def parts(self) -> list[nn.Module]:
        """In the order in which they act; called one by one, so that nobody holds the level's input meanwhile."""
        return [*self.block, *(step for step in (self.downsample, self.upsample) if step is not None)]

    def forward(self, x: Tensor) -> Tensor:
        """(b, inside, h, w) → (b, out, h', w')."""
        for part in self.parts:
            x = part(x)
        return x


class Encoder(nn.Module):
    """Picture → mean and log variance of the latents before ``quant_conv``."""

    def __init__(
        self, picture: int, z: int, stem: int, widths: Sequence[int], blocks: int, groups: int, attend: bool
    ):
        super().__init__()
        last = len(widths) - 1
        inside = [stem, *widths[:-1]]
        self.conv_in = nn.Conv2d(picture, stem, 3, padding=1)
        self.down = nn.ModuleList(
            Level(inside[i], widths[i], blocks, groups, "down" if i < last else None) for i in range(last + 1)
        )
        self.mid = Middle(widths[-1], groups, attend)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, 2z, h/f, w/f)."""
        x = self.conv_in(x)
        for part in (part for level in self.down for part in level.parts):  # type: ignore[union-attr]
            x = part(x)
        x = self.mid(x)
        return self.conv_out(fresh.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents after ``post_quant_conv`` → picture. ``up`` counts from the picture's resolution, as in LDM."""

    def __init__(self, picture: int, z: int, widths: Sequence[int], blocks: int, groups: int, attend: bool):
        super().__init__()
        inside = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, attend)
        self.up = nn.ModuleList(
            Level(inside[i], widths[i], blocks + 1, groups, "up" if i else None) for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], picture, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(b, z, h, w) → (b, c, h·f, w·f)."""
        x = self.mid(self.conv_in(z))
        for part in (part for level in reversed(self.up) for part in level.parts):  # type: ignore[union-attr]
            x = part(x)
        return self.conv_out(fresh.silu(self.norm_out(x)))


@register("kl", paper="Rombach et al. 2022, arXiv:2112.10752")
class Kl(nn.Module):
    """KL-regularised autoencoder; modules are named as in the official LDM and FLUX code.

    Latents that leave and enter are scale · (z - shift), about of unit spread. Sides of pictures are multiples of
    ``factor`` = 2^(levels - 1).

    Args:
        channels: of the latents.
        widths: channels of the levels, from the picture's resolution down.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        groups: of the norms; divides all widths.
        scale, shift: put latents to about unit spread and zero mean.
        quant: 1×1 convolutions stand between both halves and the latents (SD 1, 2 and XL).
        attend: self-attention at the lowest resolution.
        picture_channels: of the picture.
        stem: channels of the first convolution; those of the first level by default.
        tile: side in latents of the tiles that ``decode`` takes larger pictures apart into; 0 for never. Costs
            memory as for one tile; pixels differ by what attention and norms see.
        overlap: part of a tile's side shared with its neighbour, where both are blended.

    Raises:
        KitError: widths that the groups do not divide; an impossible tile; when called, a misshapen picture or
            latents.
    """

    def __init__(
        self,
        channels: int = 4,
        widths: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        groups: int = 32,
        scale: float = 0.18215,
        shift: float = 0.0,
        quant: bool = True,
        attend: bool = True,
        picture_channels: int = 3,
        stem: int | None = None,
        tile: int = 0,
        overlap: float = 0.25,
    ):
        super().__init__()
        if not widths or any(width % groups for width in widths):
            raise KitError(f"kl widths {list(widths)} must be multiples of groups ({groups})")
        if tile < 0 or 0 < tile < 8:
            raise KitError(f"kl tile {tile}: give a side of at least 8 latents, or 0 to decode in one piece")
        if not 0 <= overlap <= 0.5:
            raise KitError(f"kl overlap {overlap:g} must lie between 0 and 0.5 of a tile")
        self.channels, self.factor = channels, 2 ** (len(widths) - 1)
        self.scale, self.shift, self._width = scale, shift, widths[0]
        self.picture_channels, self.tile, self.overlap = picture_channels, tile, overlap
        self.encoder = Encoder(picture_channels, channels, stem or widths[0], widths, blocks, groups, attend)
        self.decoder = Decoder(picture_channels, channels, widths, blocks, groups, attend)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if quant else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if quant else None

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (b, z, h/f, w/f) of unscaled latents of pictures (b, c, h, w)."""
        if pictures.ndim != 4 or pictures.shape[1] != self.picture_channels:
            raise KitError(
                f"pictures of shape {tuple(pictures.shape)}: this kl takes (b, {self.picture_channels}, h, w)"
            )
        h, w = pictures.shape[-2:]
        if h % self.factor or w % self.factor:
            raise KitError(f"pictures of {h}×{w}: sides must be multiples of {self.factor}")
        x = self.encoder(_as_weights(self.encoder, pictures).contiguous(memory_format=torch.channels_last))
        mean, logvar = (x if self.quant_conv is None else self.quant_conv(x)).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(*_LOGVAR)).exp()

    def encode(
        self, pictures: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Pictures (b, c, h, w) in [-1, 1] → scaled latents (b, z, h/f, w/f).

        Args:
            pictures: any floating dtype; the answer has that of the weights.
            sample: draw from the distribution instead of taking its mean, which is also its mode.
            generator: of the draw.
        """
        mean, std = self.moments(pictures)
        if sample:
            noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
            mean = mean + std * noise
        return self.scale * (mean - self.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, z, h, w) → pictures (b, c, h·f, w·f) in [-1, 1], up to overshoot.

        Latents may be of any floating dtype, pictures have that of the weights.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise KitError(
                f"latents of shape {tuple(latents.shape)}: this kl takes (b, {self.channels}, h, w)"
            )
        z = _as_weights(self.decoder, latents / self.scale + self.shift)
        if self.tile and max(z.shape[-2:]) > self.tile:
            return self._tiled(z)
        return self._decode(z)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (b, c, h, w) in [-1, 1] → their reconstruction from the mode."""
        return self.decode(self.encode(pictures))

    def _decode(self, z: Tensor) -> Tensor:
        if z.device.type == "cpu" and len(z) > (few := self._together(z)):
            return torch.cat([self._decode(some) for some in z.split(few)])
        # channels last, as all that follow stay then: convolutions at the picture's size need no copies
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)).contiguous()

    def _together(self, z: Tensor) -> int:
        """Pictures that a CPU decodes at once: as many as it has work enough with, in the memory of so many."""
        pixels = z.shape[-2] * z.shape[-1] * self.factor**2
        return math.ceil(_ENOUGH / (pixels * self._width))

    def _tiled(self, z: Tensor) -> Tensor:
        """The weighted mean of overlapping tiles; weights fall off linearly towards a tile's borders."""
        f, (b, _, h, w) = self.factor, z.shape
        out = torch.zeros(b, self.picture_channels, h * f, w * f, device=z.device)
        total = torch.zeros(h * f, w * f, device=z.device)
        side = (min(self.tile, h), min(self.tile, w))
        window = _ramp(side[0] * f, self.overlap, z.device)[:, None] * _ramp(
            side[1] * f, self.overlap, z.device
        )
        for top in _starts(h, side[0], self.overlap):
            for left in _starts(w, side[1], self.overlap):
                picture = self._decode(z[:, :, top : top + side[0], left : left + side[1]])
                rows = slice(top * f, (top + side[0]) * f)
                columns = slice(left * f, (left + side[1]) * f)
                out[:, :, rows, columns] += window * picture
                total[rows, columns] += window
        return (out / total).to(z.dtype)


def _as_weights(module: nn.Module, x: Tensor) -> Tensor:
    return x.to(next((p.dtype for p in module.parameters()), x.dtype))


def _norm(dim: int, groups: int) -> nn.GroupNorm:
    return PictureNorm(groups, dim, eps=1e-6)


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """First cells of the tiles that cover ``length``, evenly spread and sharing at least the overlap."""
    step = max(1, math.floor(tile * (1 - overlap)))
    number = 1 + math.ceil((length - tile) / step)
    return [round(i * (length - tile) / max(1, number - 1)) for i in range(number)]


def _ramp(length: int, overlap: float, device: torch.device) -> Tensor:
    """Weights (length,) of a tile's pixels: 1 within, falling linearly towards both ends, never 0."""
    place = torch.arange(length, device=device) + 0.5
    return (torch.minimum(place, length - place) / max(1.0, overlap * length)).clamp(max=1.0)


def _size(name: str, **facts: str) -> Callable[[Callable[..., Kl]], Callable[..., Kl]]:
    """Register a published autoencoder, which leaves open how it decodes."""

    def add(build: Callable[..., Kl]) -> Callable[..., Kl]:
        free = [p for key, p in inspect.signature(Kl).parameters.items() if key in ("tile", "overlap")]
        build.__signature__ = inspect.signature(Kl).replace(parameters=free)  # type: ignore[attr-defined]
        build.__annotations__ = {p.name: p.annotation for p in free} | {"return": "Kl"}
        return register(name, **facts)(build)

    return add


@_size("kl_sd", used_by="Stable Diffusion 1 and 2, DiT, PixArt-α")
def kl_sd(**options) -> Kl:
    """Stable Diffusion 1's autoencoder: 4 channels, side / 8, 84 M parameters."""
    return Kl(channels=4, scale=0.18215, **options)


@_size("kl_sd_x4", used_by="Stable Diffusion's 4× upscaler")
def kl_sd_x4(**options) -> Kl:
    """Of Stable Diffusion's 4× upscaler: 4 channels, side / 4, 55 M parameters. In fp16 it overflows."""
    return Kl(channels=4, widths=(128, 256, 512), scale=0.08333, **options)


@_size("kl_sdxl", used_by="SDXL, PixArt-Σ")
def kl_sdxl(**options) -> Kl:
    """SDXL's: as Stable Diffusion 1's, trained anew. In fp16 the published weights overflow: use bf16 or fp32."""
    return Kl(channels=4, scale=0.13025, **options)


@_size("kl_sd3", used_by="Stable Diffusion 3 and 3.5")
def kl_sd3(**options) -> Kl:
    """Stable Diffusion 3's: 16 channels, side / 8, 84 M parameters."""
    return Kl(channels=16, scale=1.5305, shift=0.0609, quant=False, **options)


@_size("kl_flux", used_by="FLUX.1")
def kl_flux(**options) -> Kl:
    """FLUX.1's: 16 channels, side / 8, 84 M parameters."""
    return Kl(channels=16, scale=0.3611, shift=0.1159, quant=False, **options)

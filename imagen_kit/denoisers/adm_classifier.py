"""ADM's classifier of noisy pictures: the way down of its U-Net and an attention pool (Dhariwal & Nichol 2021, §4).

It guides, it does not denoise: a stage names it among its ``networks``, and the guidance ``classifier`` follows the
gradient of what it says.

Axes: b batch, c channels, h w picture, n cells, k classes, e embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import AttentionBlock, ResBlock, Style
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells
from imagen_kit.denoisers.layers.skeleton import Level, Unit
from imagen_kit.errors import KitError

_STYLE = Style(resample="residual", groups=32)


class AttentionPool(nn.Module):
    """One vector of all cells: what their mean reads among itself and them (CLIP's pooling, Radford et al. 2021).

    Args:
        channels: width of a cell.
        side: of the square of cells.
        head_dim: width of a head.
        out_channels: width of the vector.
    """

    def __init__(self, channels: int, side: int, head_dim: int, out_channels: int):
        super().__init__()
        self.head_dim, self.side = head_dim, side
        self.places = nn.Parameter(torch.randn(channels, side**2 + 1) * channels**-0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, side, side) → (b, out_channels)."""
        cells = to_cells(x)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self.places.t()
        q, k, v = split_heads(self.qkv(tokens), 3, self.head_dim)
        return self.out(join_heads(attention(q[:, :, :1], k, v))[:, 0])


@register("adm_classifier", answers="logits of classes, for the guidance 'classifier'")
class ADMClassifier(nn.Module):
    """Noisy pictures and their times to logits of classes.

    Args:
        num_classes: k.
        image_size: side of x.
        in_channels: channels of x.
        levels: resolutions from fine to coarse, each a ``Level`` or a mapping of its fields; attention is True
            or False.
        embed_dim: width of the time embedding's sinusoids, a quarter of its own.
        head_dim: width of a head.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).

    Raises:
        KitError: a side that the levels do not divide, widths that the heads do not; when called, a picture of
            another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 64,
        in_channels: int = 3,
        levels: Sequence[Level | Mapping[str, Any]] = (
            {"channels": 128},
            {"channels": 256, "attention": True},
        ),
        embed_dim: int | None = None,
        head_dim: int = 64,
        time_scale: float = 1.0,
    ):
        super().__init__()
        stages = [Level.of(level) for level in levels]
        if not stages or image_size % 2 ** (len(stages) - 1):
            raise KitError(f"adm_classifier of {len(stages)} levels: it cannot halve a side of {image_size}")
        if any(level.channels % head_dim for level in stages if level.attention or level is stages[-1]):
            raise KitError(f"adm_classifier: head_dim {head_dim} must divide the channels that attend")
        self.shape = (in_channels, image_size, image_size)
        self.out_channels = num_classes
        width, channels = embed_dim or stages[0].channels, stages[0].channels
        dim = 4 * width
        self.time = TimestepEmbedder(dim, width, time_scale)
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()

        def res(out: Level, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, out.channels, dim, out.dropout, _STYLE, resample)

        def attend(level: Level) -> AttentionBlock:
            norm = _STYLE.norm(level.channels)
            return AttentionBlock(level.channels, head_dim, expansion=0, places=False, norm=norm)

        for i, level in enumerate(stages):
            units = nn.ModuleList()
            for _ in range(level.blocks):
                units.append(Unit(res(level), attend(level) if level.attention else None))
                channels = level.channels
            self.down.append(units)
            if i < len(stages) - 1:
                self.shrink.append(res(level, "down"))
        last = stages[-1]
        self.middle = Unit(res(last), attend(last), res(last))
        self.norm_out = _STYLE.norm(channels)
        self.pool = AttentionPool(channels, image_size // 2 ** (len(stages) - 1), head_dim, num_classes)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The logits.

        Args:
            x: (b, in_channels, image_size, image_size) noisy picture.
            t: (b,) native times.
            cond: not looked at: the class is what is asked.

        Returns:
            (b, num_classes).
        """
        if x.shape[1:] != self.shape:
            raise KitError(
                f"picture of shape {tuple(x.shape)}: this adm_classifier takes (b, {', '.join(map(str, self.shape))})"
            )
        if t.shape != x.shape[:1]:
            raise KitError(f"times of shape {tuple(t.shape)}: give one for each of the {len(x)} pictures")
        emb = _STYLE.activate(self.time(t))
        h = self.stem(x)
        for i, units in enumerate(self.down):
            for unit in units:  # type: ignore[attr-defined]
                h = unit(h, emb, None, None)
            if i < len(self.shrink):
                h = self.shrink[i](h, emb)
        h = self.middle(h, emb, None, None)
        return self.pool(_STYLE.activate(self.norm_out(h)))


SIZES: dict[int, dict[str, Any]] = {
    64: {"widths": (128, 256, 384, 512), "blocks": 4},
    128: {"widths": (128, 128, 256, 384, 512), "blocks": 2},
    256: {"widths": (128, 128, 256, 256, 512, 512), "blocks": 2},
    512: {"widths": (64, 128, 128, 256, 256, 512, 512), "blocks": 2},
}


def published(side: int) -> dict[str, Any]:
    """Of the published classifier for pictures of this side: the cells of the three coarsest levels attend."""
    widths, blocks = SIZES[side]["widths"], SIZES[side]["blocks"]
    attended = range(len(widths) - 3, len(widths))
    levels = [{"channels": c, "blocks": blocks, "attention": i in attended} for i, c in enumerate(widths)]
    return {"image_size": side, "levels": levels, "embed_dim": 128}


@register("adm_classifier_64", answers="logits of ImageNet's classes")
def adm_classifier_64(time_scale: float = 1.0) -> ADMClassifier:
    """ADM's classifier for ImageNet 64²: 65 M parameters."""
    return ADMClassifier(**published(64), time_scale=time_scale)


@register("adm_classifier_128", answers="logits of ImageNet's classes")
def adm_classifier_128(time_scale: float = 1.0) -> ADMClassifier:
    """ADM's classifier for ImageNet 128²: 43 M parameters."""
    return ADMClassifier(**published(128), time_scale=time_scale)


@register("adm_classifier_256", answers="logits of ImageNet's classes")
def adm_classifier_256(time_scale: float = 1.0) -> ADMClassifier:
    """ADM's classifier for ImageNet 256²: 54 M parameters."""
    return ADMClassifier(**published(256), time_scale=time_scale)


@register("adm_classifier_512", answers="logits of ImageNet's classes")
def adm_classifier_512(time_scale: float = 1.0) -> ADMClassifier:
    """ADM's classifier for ImageNet 512²: 54 M parameters."""
    return ADMClassifier(**published(512), time_scale=time_scale)

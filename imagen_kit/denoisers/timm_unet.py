"""A U-Net whose encoder is any of timm's image models.

Every feature map is brought to the decoder's width and modulated by time and conditioning (FiLM: Perez et al. 2018),
then joined on the way up as in a feature pyramid (Lin et al. 2017). Maps stop at a quarter of the picture's side
(ConvNeXt) or a sixteenth (ViT): finer skip connections come from a few convolutions over the picture itself.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import OWN, AttentionBlock, Grow, ResBlock, group_norm, zeroed
from imagen_kit.denoisers.layers.context import share
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.pictures import modulated
from imagen_kit.denoisers.layers.skeleton import Skeleton, Unit, spec
from imagen_kit.denoisers.layers.timm_backbone import Backbone, Features
from imagen_kit.denoisers.layers.told import Told
from imagen_kit.errors import KitError


@dataclass(frozen=True)
class Decoder:
    """The way up.

    Attributes:
        width: channels at the picture's own resolution; they double from level to level,
        widest: up to this.
        blocks: residual blocks a level.
        attention: reductions (the picture's side over the map's) from which attention, joined with text, follows
            each block; at the coarsest level it always does.
        head_dim: width of an attention head.
        dropout: probability inside the residual blocks.
    """

    width: int = 64
    widest: int = 512
    blocks: int = 2
    attention: int = 8
    head_dim: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.width < 1 or self.widest < self.width:
            raise KitError("timm_unet decoder: blocks and width must be at least 1, widest at least width")


class Lateral(nn.Module):
    """Feature maps of one size → the decoder's width, normalised and modulated: norm(W·maps)·(1 + scale) + shift."""

    def __init__(self, channels: int, out_channels: int, embed_dim: int):
        super().__init__()
        self.project = nn.Conv2d(channels, out_channels, 1)
        self.norm = group_norm(out_channels)
        self.embed = nn.Linear(embed_dim, 2 * out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(b, c, h, w), activated embedding (b, e) → (b, out, h, w)."""
        scale, shift = self.embed(emb)[:, :, None, None].chunk(2, dim=1)
        return modulated(self.norm(self.project(x)), scale, shift)


@register("timm_unet")
class TimmUNet(Skeleton):
    """A denoiser on any timm backbone (ConvNeXt, EfficientNet, ResNet, ViT, Swin …): its maps, a U-Net's way up.

    Needs timm. Any model that has feature maps will do, pictures of any side its maps divide; models that are
    bound to one size by their own design (MaxViT's windows, LeViT's tables) take that size alone.

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default (twice that for a learned variance).
        backbone: a name of ``timm.list_models()``, or a ``Backbone``, or a mapping of its fields.
        pretrained: file of timm weights for the backbone; None for random ones. Nothing is ever downloaded.
        decoder: a ``Decoder`` or a mapping of its fields.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, None where it has none.
        text_depth: trained transformer layers between the frozen text features and the attention.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        low_res_channels: channels of the low-resolution picture of a super-resolution stage, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.

    Raises:
        KitError: a model that timm does not know or cannot make an encoder, weights that do not fit it, widths
            that heads do not divide, an unknown field or option; when called, a missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        backbone: str | Backbone | Mapping[str, Any] = "convnext_tiny",
        pretrained: str | Path | None = None,
        decoder: Decoder | Mapping[str, Any] | None = None,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        text_depth: int = 0,
        num_classes: int | None = None,
        low_res_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Mapping[str, bool] | None = None,
    ):
        super().__init__(runtime)
        kind = spec(Backbone, {"name": backbone} if isinstance(backbone, str) else backbone, "timm backbone")
        self.out_channels = out_channels or in_channels
        self.backbone = Features(kind, in_channels + low_res_channels, pretrained)
        self.way_up = spec(Decoder, decoder or {}, "timm_unet decoder")
        self.reductions = _ladder(self.backbone.reductions)
        self.widths = [min(self.way_up.width << i, self.way_up.widest) for i in range(len(self.reductions))]
        head_dim = self.way_up.head_dim
        for i, width in enumerate(self.widths):
            if self._attends(i) and width % head_dim:
                raise KitError(f"timm_unet level of {width} channels: head_dim {head_dim} must divide it")
        self.inputs = Inputs(
            "timm_unet",
            in_channels,
            math.lcm(*self.backbone.reductions),
            context_dim,
            pooled_dim,
            num_classes,
            low_res_channels,
        )
        self.embed_dim = 4 * self.way_up.width
        self.text_dim = None if context_dim is None else max(self.widths)
        self.told = Told(
            *(self.embed_dim, max(self.widths), context_dim, pooled_dim, text_depth, num_classes),
            low_res_noised=bool(low_res_channels),
            time_scale=time_scale,
            head_dim=head_dim,
        )
        self._make(in_channels + low_res_channels)

    def _attends(self, i: int) -> bool:
        """Whether attention stands at level i, counted from the picture's own resolution."""
        return i == len(self.reductions) - 1 or self.reductions[i] >= self.way_up.attention

    def _make(self, channels: int) -> None:
        """Keys: ``pyramid`` from fine to coarse; ``lateral``, ``up``, ``grow`` from coarse to fine."""
        count, own = len(self.reductions), self.reductions.index(self.backbone.reductions[0])
        before = [channels, *self.widths]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(before[i], self.widths[i], 3, stride=2 if i else 1, padding=1) for i in range(own)
        )
        self.lateral, self.up, self.grow = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(count)):
            given = self.widths[i]
            if i >= own:
                pairs = zip(self.backbone.channels, self.backbone.reductions, strict=True)
                given = sum(c for c, reduction in pairs if reduction == self.reductions[i])
            self.lateral.append(Lateral(given, self.widths[i], self.embed_dim))
            self.up.append(self._units(i, self.widths[i] * (1 if i == count - 1 else 2)))
            if i:
                self.grow.append(Grow(self.widths[i], self.widths[i - 1]))
        self.number_units(1)
        self.norm_out = group_norm(self.widths[0])
        self.head = zeroed(nn.Conv2d(self.widths[0], self.out_channels, 3, padding=1))
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _units(self, i: int, channels: int) -> nn.ModuleList:
        units, width = nn.ModuleList(), self.widths[i]
        for _ in range(self.way_up.blocks):
            res = ResBlock(channels, width, self.embed_dim, self.way_up.dropout, OWN)
            block = AttentionBlock(width, self.way_up.head_dim, self.text_dim) if self._attends(i) else None
            units.append(Unit(res, block))
            channels = width
        return units

    def _maps(self, x: Tensor) -> list[Tensor]:
        """(b, in, h, w) → what each level is given, from fine to coarse."""
        maps: list[Tensor] = []
        for i, conv in enumerate(self.pyramid):
            maps.append(conv(F.silu(maps[-1]) if i else x))
        features = self._apply_block(self.backbone, x)
        for reduction in self.reductions[len(maps) :]:
            pairs = zip(features, self.backbone.reductions, strict=True)
            maps.append(torch.cat([y for y, of in pairs if of == reduction], dim=1))
        return maps

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text adapted and pooled, and every layer's keys and values of it."""
        self.inputs.check_text(cond)
        return self.told.prepare(self, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture; sides multiples of the maps' reductions.
            t: (b,) native times.
            cond: conditioning; the parts the network was built with must be present.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        emb, context = self.told(t, cond)
        emb = F.silu(emb)
        x = self.inputs.picture(x, cond)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        maps = self._maps(x)
        h = None
        for i, (lateral, units) in enumerate(zip(self.lateral, self.up, strict=True)):
            own = lateral(maps.pop(), emb)
            h = own if h is None else torch.cat([self.grow[i - 1](h, None, own.shape[-2:]), own], dim=1)
            for unit in units:  # type: ignore[attr-defined]
                h = self._apply_block(unit, h, emb, share(context, unit), cond.mask)
        return self.head(F.silu(self.norm_out(h)))


def _ladder(reductions: list[int]) -> list[int]:
    """Reductions of all levels from 1 up: powers of two finer than the finest map, then those of the maps."""
    finer = [2**i for i in range(reductions[0].bit_length()) if 2**i < reductions[0]]
    return finer + sorted(set(reductions))

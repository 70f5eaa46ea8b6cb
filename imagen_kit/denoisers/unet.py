"""The U-Net of ADM and Imagen: residual blocks, attention joined with text, low-resolution conditioning.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import AttentionBlock, ResBlock, group_norm, zeroed
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.text import TextAdapter
from imagen_kit.errors import KitError


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net.

    Attributes:
        channels: width.
        blocks: residual blocks on the way down (one more on the way up).
        attention: whether an attention block, joined with text where there is text, follows each of them.
        dropout: probability inside the residual blocks.
    """

    channels: int
    blocks: int = 2
    attention: bool = False
    dropout: float = 0.0

    @staticmethod
    def of(value: Level | Mapping[str, Any]) -> Level:
        if isinstance(value, Level):
            return value
        try:
            return Level(**value)
        except TypeError as error:
            raise KitError(
                f"unet level {dict(value)!r}: takes channels, blocks, attention, dropout ({error})"
            ) from None


class Unit(nn.Module):
    """A residual block and, at attention levels, the attention block after it."""

    def __init__(self, channels: int, level: Level, embed_dim: int, head_dim: int, context_dim: int | None):
        super().__init__()
        self.res = ResBlock(channels, level.channels, embed_dim, level.dropout)
        self.attention = AttentionBlock(level.channels, head_dim, context_dim) if level.attention else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, context, mask)


@register("unet")
class UNet(nn.Module):
    """ADM/Imagen U-Net: text joined to self-attention keys and values, pooled text in the time embedding.

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default (twice that for a learned variance).
        levels: resolutions from fine to coarse, each a ``Level`` or a mapping of its fields; the side halves
            from one to the next.
        head_dim: width of an attention head.
        patch_size: side of the pixel blocks folded into channels before the first level.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, None where it has none.
        text_depth: trained transformer layers between the frozen text features and the attention.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        low_res_channels: channels of the low-resolution picture of a super-resolution stage, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.

    Raises:
        KitError: widths that heads do not divide, an unknown runtime option, a picture whose side the levels
            do not divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        levels: Sequence[Level | Mapping[str, Any]] = (
            {"channels": 128, "blocks": 2},
            {"channels": 256, "blocks": 2, "attention": True},
        ),
        head_dim: int = 32,
        patch_size: int = 1,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        text_depth: int = 0,
        num_classes: int | None = None,
        low_res_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Mapping[str, bool] | None = None,
    ):
        super().__init__()
        spec = [Level.of(level) for level in levels]
        self._check(spec, head_dim)
        options = {"checkpointing": False, "channels_last": False, **(runtime or {})}
        if unknown := set(options) - {"checkpointing", "channels_last"}:
            raise KitError(
                f"unet runtime option {sorted(unknown)[0]!r}; choose from checkpointing, channels_last"
            )
        self.checkpointing, self.channels_last = options["checkpointing"], options["channels_last"]
        self.out_channels = out_channels or in_channels
        multiple = patch_size * 2 ** (len(spec) - 1)
        self.inputs = Inputs(
            "unet", in_channels, multiple, context_dim, pooled_dim, num_classes, low_res_channels
        )
        width, embed_dim = spec[0].channels, 4 * spec[0].channels

        self.time = TimestepEmbedder(embed_dim, scale=time_scale)
        text_dim = None if context_dim is None else max(level.channels for level in spec)
        self.text = (
            None
            if context_dim is None or text_dim is None
            else TextAdapter(context_dim, text_dim, embed_dim, pooled_dim, text_depth, head_dim)
        )
        self.labels = None if num_classes is None else nn.Embedding(num_classes + 1, embed_dim)
        self.low_res_level = TimestepEmbedder(embed_dim, scale=1000.0) if low_res_channels else None

        self.fold = nn.PixelUnshuffle(patch_size)
        folded = (in_channels + low_res_channels) * patch_size**2
        self.stem = nn.Conv2d(folded, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips, channels = [width], width
        for i, level in enumerate(spec):
            units = nn.ModuleList()
            for _ in range(level.blocks):
                units.append(Unit(channels, level, embed_dim, head_dim, text_dim))
                channels = level.channels
                skips.append(channels)
            self.down.append(units)
            if i < len(spec) - 1:
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        middle = Level(channels, attention=spec[-1].attention, dropout=spec[-1].dropout)
        self.middle = Unit(channels, middle, embed_dim, head_dim, text_dim)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, level in reversed(list(enumerate(spec))):
            units = nn.ModuleList()
            for _ in range(level.blocks + 1):
                units.append(Unit(channels + skips.pop(), level, embed_dim, head_dim, text_dim))
                channels = level.channels
            self.up.append(units)
            if i:
                # To the finer level's width at once: the convolution runs at that level's four times larger size.
                channels = spec[i - 1].channels
                self.grow.append(nn.Conv2d(level.channels, channels, 3, padding=1))
        self.norm_out = group_norm(channels)
        self.head = zeroed(nn.Conv2d(channels, self.out_channels * patch_size**2, 3, padding=1))
        self.unfold = nn.PixelShuffle(patch_size)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _check(spec: Sequence[Level], head_dim: int) -> None:
        if not spec:
            raise KitError("unet levels: give at least one level, e.g. [{channels: 64, blocks: 2}]")
        for level in spec:
            if level.attention and level.channels % head_dim:
                raise KitError(f"unet level of {level.channels} channels: head_dim {head_dim} must divide it")
        if max(level.channels for level in spec) % head_dim:
            raise KitError(f"unet head_dim {head_dim} must divide the widest level")

    def _embed(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """Activated embedding (b, e) of time and conditioning, adapted text tokens (b, n, d)."""
        emb, context = self.time(t), None
        if self.text is not None and cond.tokens is not None:
            context, vector = self.text(cond.tokens, cond.mask, cond.pooled)
            emb = emb + vector
        if self.labels is not None and cond.labels is not None:
            emb = emb + self.labels(cond.labels)
        if self.low_res_level is not None and cond.low_res_level is not None:
            emb = emb + self.low_res_level(cond.low_res_level)
        return nn.functional.silu(emb), context

    def _run(self, unit: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(unit, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return unit(*inputs)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture.
            t: (b,) native times.
            cond: conditioning; the parts the network was built with must be present.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        emb, context = self._embed(t, cond)
        mask = cond.mask
        x = self.fold(self.inputs.picture(x, cond))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        skips = [x]
        for i, units in enumerate(self.down):
            for unit in units:  # type: ignore[attr-defined]
                x = self._run(unit, x, emb, context, mask)
                skips.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
                skips.append(x)
        x = self._run(self.middle, x, emb, context, mask)
        for i, units in enumerate(self.up):
            for unit in units:  # type: ignore[attr-defined]
                x = self._run(unit, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            if i < len(self.grow):
                x = self.grow[i](nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.unfold(self.head(nn.functional.silu(self.norm_out(x))))

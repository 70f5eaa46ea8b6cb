"""Imagen's three networks: the Efficient U-Net of its super-resolution stages, and the base's named size.

Saharia et al. 2022, appendices B and F. What makes the U-Net efficient (appendix B): most residual blocks stand at
low resolution; skip connections are scaled by 1/√2; the picture shrinks before the convolutions of a level and
grows after them, so that the finest resolution sees two convolutions alone.

Where the paper leaves a choice:
 - the sums it scales. The papers that it cites for the 1/√2 (Song et al. 2021; SR3) scale residual sums; the text
   speaks of skip connections. Both kinds of sum are scaled here: each then keeps the variance of its addends.
 - skip connections are added, as its figures draw them, and the coarsest level, which has none, takes no sum.
 - the width of the embedding. The same blocks are called 600 M parameters at 64² → 256² and 400 M at
   256² → 1024². Their convolutions alone come to 422 M, and modulation by a wide embedding is what can add the
   rest: the first has the base's width of 2048 here, the second four times its finest level.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.adm import ADM
from imagen_kit.denoisers.adm_sizes import levels as adm_levels
from imagen_kit.denoisers.layers.blocks import AttentionBlock, Grow, ResBlock, Style, zeroed
from imagen_kit.denoisers.layers.context import Context, share
from imagen_kit.denoisers.layers.inner import inner, place
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.skeleton import Attention, Level, Skeleton, Unit, spec
from imagen_kit.denoisers.layers.told import Told
from imagen_kit.errors import KitError

HALF = 2**-0.5  # keeps the variance of a sum of two
STYLE = Style(skip_scale=HALF)
Runtime = Mapping[str, bool] | None


class ProjectedBlock(ResBlock):
    """A residual block whose shortcut is a convolution of side 1 at every width (figure A.27)."""

    def __init__(self, channels: int, embed_dim: int, dropout: float = 0.0):
        super().__init__(channels, channels, embed_dim, dropout, STYLE)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.is_residual = False  # without its convolutions a block would still project


@register("efficient_unet")
class EfficientUNet(Skeleton):
    """Imagen's Efficient U-Net: shrinks first, grows last, most blocks at low resolution.

    The default is a small one without conditioning.

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default (twice that for a learned variance).
        levels: from fine to coarse, each a ``Level`` or a mapping of its fields. Every one has half the side of
            the one before, the first half the picture's. As many residual blocks go up as go down; attention
            follows the last of them, ``{heads: 8}`` among the cells joined with text, ``{heads: 8, cells:
            false}`` from the cells to the text alone.
        embed_dim: width of the embedding; four times the first level's by default.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, None where it has none (T5).
        text_depth: trained transformer layers between the frozen text features and the attention.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        low_res_channels: channels of the low-resolution picture of a super-resolution stage, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.

    Raises:
        KitError: widths that heads do not divide, attention to a text that there is not, an unknown field or
            option; when called, a missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        levels: Sequence[Level | Mapping[str, Any]] = (
            {"channels": 64, "blocks": 2},
            {"channels": 128, "blocks": 4, "attention": {"heads": 4}},
        ),
        embed_dim: int | None = None,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        text_depth: int = 0,
        num_classes: int | None = None,
        low_res_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Runtime = None,
    ):
        super().__init__(runtime)
        stages = [Level.of(level) for level in levels]
        if not stages or any(level.blocks < 1 or level.resample for level in stages):
            raise KitError(
                "efficient_unet levels: give at least one, each of one block or more and without resample, "
                "e.g. [{channels: 64, blocks: 2}]"
            )
        self.out_channels = out_channels or in_channels
        self.inputs = Inputs(
            "efficient_unet",
            in_channels,
            2 ** len(stages),
            context_dim,
            pooled_dim,
            num_classes,
            low_res_channels,
        )
        self.embed_dim = embed_dim or 4 * stages[0].channels
        self.text_dim = None if context_dim is None else max(level.channels for level in stages)
        self.told = Told(
            self.embed_dim,
            self.text_dim or 0,
            context_dim,
            pooled_dim,
            text_depth,
            num_classes,
            bool(low_res_channels),
            time_scale,
        )
        self._make(in_channels + low_res_channels, stages)

    def _make(self, channels: int, stages: Sequence[Level]) -> None:
        """All blocks: ``stem``, ``down.{level}.shrink|units``, ``up.{level}.units|grow`` from coarse to fine."""
        width = stages[0].channels
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.shrink, self.down = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, level in enumerate(stages):
            finer = stages[max(i - 1, 0)].channels
            self.shrink.append(nn.Conv2d(finer, level.channels, 3, stride=2, padding=1))
            self.down.append(self._units(level))
            self.up.insert(0, self._units(level))
            self.grow.insert(0, Grow(level.channels, finer))
        self.number_units(1)
        self.norm_out = STYLE.norm(width)
        self.head = zeroed(nn.Conv2d(width, self.out_channels, 3, padding=1))
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _units(self, level: Level) -> nn.ModuleList:
        """The residual blocks of a level, the last with the level's attention."""
        blocks = [ProjectedBlock(level.channels, self.embed_dim, level.dropout) for _ in range(level.blocks)]
        last = len(blocks) - 1
        return nn.ModuleList(
            Unit(block, self._attention(level) if i == last else None) for i, block in enumerate(blocks)
        )

    def _attention(self, level: Level) -> nn.Module | None:
        if level.attention is False:
            return None
        given = {"heads": 8} if level.attention is True else level.attention
        kind = spec(Attention, given, "efficient_unet attention")
        if kind.kind != "plain":
            raise KitError("efficient_unet attention: its kind is plain")
        if not kind.cells and self.text_dim is None:
            raise KitError("efficient_unet attention without cells reads text alone: give context_dim")
        head_dim = level.channels // kind.heads_of(level.channels)
        # The MLP of twice the width belongs to the paper's self-attention (figure A.27).
        expansion = 2 if kind.cells else 0
        return AttentionBlock(
            level.channels, head_dim, self.text_dim, expansion, places=False, cells=kind.cells
        )

    def _level(
        self, units: nn.Module, x: Tensor, emb: Tensor, context: Context, mask: Tensor | None
    ) -> Tensor:
        for unit in units:  # type: ignore[attr-defined]
            x = self._apply_block(unit, x, emb, share(context, unit), mask)
        return x

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text adapted and pooled, and every layer's keys and values of it."""
        self.inputs.check_text(cond)
        return self.told.prepare(self, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture; sides multiples of 2^levels.
            t: (b,) native times.
            cond: conditioning; the parts the network was built with must be present.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        emb, context = self.told(t, cond)
        told = (F.silu(emb), context, cond.mask)
        x = self.inputs.picture(x, cond)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        cut = place(len(self.down) - 1)
        skips: list[Tensor] = []
        x = self._way_down(range(cut), skips, self.stem(x), *told)
        x = inner(partial(self._core, cut), x, told)
        x = self._way_up(range(cut), skips, x, *told)
        return self.head(F.silu(self.norm_out(x)))

    def _core(self, cut: int, x: Tensor, *told: Any) -> Tensor:
        """What the levels from ``cut`` on make of the last outer one's answer, at that one's size."""
        levels = range(cut, len(self.down))
        skips: list[Tensor] = []
        x = self._way_down(levels, skips, x, *told)
        skips.pop()  # the coarsest level's answer goes straight up
        x = self._lift(levels[-1], x, *told)
        return self._way_up(levels[:-1], skips, x, *told)

    def _way_down(self, levels: range, skips: list[Tensor], x: Tensor, *told: Any) -> Tensor:
        for i in levels:
            x = self._level(self.down[i], self.shrink[i](x), *told)
            skips.append(x)
        return x

    def _way_up(self, levels: range, skips: list[Tensor], x: Tensor, *told: Any) -> Tensor:
        for i in reversed(levels):
            x = self._lift(i, HALF * (x + skips.pop()), *told)
        return x

    def _lift(self, i: int, x: Tensor, *told: Any) -> Tensor:
        """Level ``i`` on the way up, then twice the side."""
        j = len(self.up) - 1 - i  # these lists go from coarse to fine
        x = self._level(self.up[j], x, *told)
        return self._apply_block(self.grow[j], x, None, (2 * x.shape[-2], 2 * x.shape[-1]))

    @property
    def shares(self) -> list[float]:
        """By place, a level each, the share of units that lies inside it; see ``layers.inner``."""
        units = [len(level) for level in self.down]  # type: ignore[arg-type]
        return [sum(units[k:]) / sum(units) for k in range(1, len(units))]


def _sampling(schedule: str, guidance: float, **more: Any) -> dict[str, Any]:
    """Sampling defaults; the paper gives no number of steps."""
    discrete = {"timesteps": 1000} if schedule == "linear" else {}
    return {
        "sampling": {
            "schedule": {"name": schedule, **discrete},
            "prediction": "eps",
            "sampler": "ddpm",
            "guidance": guidance,
            "threshold": {"name": "dynamic_threshold", "percentile": 0.995},
            **more,
        }
    }


def _sr_levels(heads: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks = zip((128, 256, 512, 1024), (2, 4, 8, 8), strict=True)
    return [{"channels": c, "blocks": n, "attention": heads if c == 1024 else False} for c, n in blocks]


@register("imagen_64", **_sampling("cosine", 1.35))
def imagen_64(context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """Imagen's base, text → 64² (appendix F.1): an ADM U-Net, "2B", here 2.305 B parameters.

    Width 512 (1, 2, 3, 4), 3 residual blocks a level, heads of 64 joined with text at 32², 16² and 8², pooled
    text in the embedding. Continuous cosine schedule, eps, ancestral sampler, guidance 1.35 for the FID of table 1.
    """
    widths = [512, 1024, 1536, 2048]
    spec = adm_levels(widths, 3, {i: {"head_dim": 64} for i in (1, 2, 3)})
    embedding = {"dim": widths[-1], "text_width": widths[-1]}
    return ADM(
        3, 3, spec, embedding=embedding, context_dim=context_dim, time_scale=time_scale, runtime=runtime
    )


@register("imagen_64_to_256", **_sampling("cosine", 8.0, low_res_level=0.2))
def imagen_64_to_256(
    context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None
) -> EfficientUNet:
    """Imagen's 64² → 256² stage (appendix F.2): "600M", here 579 M parameters.

    Self-attention joined with text at the 1024 channels alone. Continuous cosine schedule, eps, ancestral
    sampler, guidance 8; the low-resolution picture's noise level 0.1 … 0.3 for the best samples, 0 for the best
    FID.
    """
    return EfficientUNet(
        *(3, 3, _sr_levels({"heads": 8}), 2048, context_dim),
        low_res_channels=3,
        time_scale=time_scale,
        runtime=runtime,
    )


@register("imagen_256_to_1024", **_sampling("linear", 8.0, low_res_level=0.2))
def imagen_256_to_1024(
    context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None
) -> EfficientUNet:
    """Imagen's 256² → 1024² stage (appendix F.3): "400M", here 468 M parameters.

    The blocks of the 64² → 256² stage, attending to the text alone; trained on 256² crops. Linear schedule, eps,
    ancestral sampler, guidance 8.
    """
    return EfficientUNet(
        *(3, 3, _sr_levels({"heads": 8, "cells": False}), 512, context_dim),
        low_res_channels=3,
        time_scale=time_scale,
        runtime=runtime,
    )

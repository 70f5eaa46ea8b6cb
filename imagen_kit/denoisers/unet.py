"""The U-Net of ADM and Imagen: residual blocks, attention joined with text, low-resolution conditioning.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import AttentionBlock
from imagen_kit.denoisers.layers.context import Context, remember
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.skeleton import Level, Skeleton
from imagen_kit.denoisers.layers.text import TextAdapter
from imagen_kit.errors import KitError


@register("unet")
class UNet(Skeleton):
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
        super().__init__(runtime)
        spec = [Level.of(level) for level in levels]
        self._check(spec, head_dim)
        self.out_channels = out_channels or in_channels
        multiple = patch_size * 2 ** (len(spec) - 1)
        self.inputs = Inputs(
            "unet", in_channels, multiple, context_dim, pooled_dim, num_classes, low_res_channels
        )
        embed_dim = 4 * spec[0].channels

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
        widths = (folded, self.out_channels * patch_size**2)
        middle = Level(spec[-1].channels, attention=spec[-1].attention, dropout=spec[-1].dropout)

        def attention(level: Level) -> nn.Module | None:
            return AttentionBlock(level.channels, head_dim, text_dim) if level.attention else None

        self.build(widths, spec, middle, embed_dim, attention)
        self.number_units(1)
        self.unfold = nn.PixelShuffle(patch_size)

    @staticmethod
    def _check(spec: Sequence[Level], head_dim: int) -> None:
        if not spec:
            raise KitError("unet levels: give at least one level, e.g. [{channels: 64, blocks: 2}]")
        for level in spec:
            if not isinstance(level.attention, bool):
                raise KitError(f"unet level attention must be true or false, not {level.attention!r}")
            if level.attention and level.channels % head_dim:
                raise KitError(f"unet level of {level.channels} channels: head_dim {head_dim} must divide it")
        if max(level.channels for level in spec) % head_dim:
            raise KitError(f"unet head_dim {head_dim} must divide the widest level")

    def _embed(self, t: Tensor, cond: Cond) -> tuple[Tensor, Context]:
        """Activated embedding (b, e) of time and conditioning, adapted text tokens (b, n, d) or their memory."""
        emb = self.time(t)
        context: Context = cond.memory
        if self.text is not None and cond.tokens is not None:
            if cond.memory is None:
                context, vector = self.text(cond.tokens, cond.mask, cond.pooled)
            else:
                vector = cond.memory[0]
            emb = emb + vector
        if self.labels is not None and cond.labels is not None:
            emb = emb + self.labels(cond.labels)
        if self.low_res_level is not None and cond.low_res_level is not None:
            emb = emb + self.low_res_level(cond.low_res_level)
        return F.silu(emb), context

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text adapted and pooled, and every layer's keys and values of it."""
        if self.text is None:
            return cond
        self.inputs.check_text(cond)
        text, vector = self.text(cond.tokens, cond.mask, cond.pooled)
        return remember(self, cond, text, vector)

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
        x = self.fold(self.inputs.picture(x, cond))
        return self.unfold(self.run(x, emb, context, cond.mask))

"""The published U-Nets: ADM (guided-diffusion) and its relatives DeepFloyd IF, Stable Diffusion and DDPM.

One class, because they are one network: IF and Stable Diffusion grew out of ADM's code (their files still share its
key names), and ADM out of DDPM's. It stands beside ``unet``, which was designed here and has parts of its own (text
adapter, pixel folding, narrowing up path); the two share skeleton, residual block and plain attention, so a fix in
one reaches all. What tells the models apart is data: a ``Style``, a list of ``Level``, an ``Embedding``.

    model          style                          attention                      told besides the time
    ADM            scale_shift, residual          plain, cells                   labels, low_res
    IF I           gelu, residual                 plain, text joins cells        text (projected, pooled)
    IF II, III     gelu, residual, skip_scale     plain, text alone              text, low_res and its level
    SD 1.x / 2.x   shift, conv                    transformer                    text
    SDXL           shift, conv                    transformer                    text, pooled text, sizes
    DDPM           shift, asymmetric              plain, cells                   –

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width, k size numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import AttentionBlock, Style
from imagen_kit.denoisers.layers.context import Context, remember
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder, timestep_embedding
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.skeleton import Attention, Level, Skeleton, spec
from imagen_kit.denoisers.layers.spatial import SpatialTransformer
from imagen_kit.denoisers.layers.text import TextPool
from imagen_kit.errors import KitError

PUBLISHED = {"resample": "residual", "groups": 32}  # ADM's style, where none is given


@dataclass(frozen=True)
class Embedding:
    """The vector that modulates every block.

    Attributes:
        dim: its width; None for four times the first level's.
        frequencies: width of the sinusoidal embedding of times and levels; None for the first level's width.
        shift, sin_first: of the sinusoids, see ``timestep_embedding`` (DDPM: 1, true).
        low_res_noised: whether a super-resolution network is told its low-resolution input's noise level (IF,
            not ADM).
        text_width, text_heads: where given, text tokens are projected to this width for the attention, and
            pooled into the vector by this many heads (IF).
        size_numbers, size_width: how many size and crop numbers are embedded, each to this width, and joined
            with the pooled text (SDXL: 6, 256).
    """

    dim: int | None = None
    frequencies: int | None = None
    shift: float = 0.0
    sin_first: bool = False
    low_res_noised: bool = True
    text_width: int | None = None
    text_heads: int = 64
    size_numbers: int = 0
    size_width: int = 256


@register("adm")
class ADM(Skeleton):
    """The U-Net of ADM, DeepFloyd IF, Stable Diffusion and DDPM, composed of blocks by level.

    Dhariwal & Nichol 2021 (§3, ADM); Rombach et al. 2022; Podell et al. 2023 (SDXL); Ho et al. 2020 (DDPM).
    The default is a small ADM without conditioning.

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default (twice that for a learned variance).
        levels: resolutions from fine to coarse, each a ``Level`` or a mapping of its fields, its attention an
            ``Attention`` or a mapping of its fields, or False.
        middle: attention between the two residual blocks of the middle, or False; by default that of the
            coarsest level.
        style: a ``Style`` or a mapping of its fields; ADM's by default.
        embedding: an ``Embedding`` or a mapping of its fields.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, for networks that are told sizes (SDXL); else None.
        num_classes: class labels 0 … num_classes - 1; None without labels. Only what the published networks
            learned: none of them has a vector for "no class".
        low_res_channels: channels of the low-resolution picture of a super-resolution stage, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.

    Raises:
        KitError: widths that heads or norm groups do not divide, an unknown field or option; when called, a
            missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        levels: Sequence[Level | Mapping[str, Any]] = (
            {"channels": 128},
            {"channels": 256, "attention": {"head_dim": 64}},
        ),
        middle: Attention | Mapping[str, Any] | bool | None = None,
        style: Style | Mapping[str, Any] = PUBLISHED,
        embedding: Embedding | Mapping[str, Any] | None = None,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        num_classes: int | None = None,
        low_res_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Mapping[str, bool] | None = None,
    ):
        super().__init__(runtime)
        stages = [Level.of(level) for level in levels]
        if not stages:
            raise KitError("adm levels: give at least one level, e.g. [{channels: 128}]")
        told = spec(Embedding, embedding or {}, "adm embedding")
        style = spec(Style, style, "adm style")
        last, width = stages[-1], stages[0].channels
        attended = last.attention if middle is None else middle
        centre = Level(last.channels, attention=attended, dropout=last.dropout)
        self._check(told, context_dim, pooled_dim)
        # A convolution up goes to whatever size the skip connection has; a residual block can but double.
        doubles = any((level.resample or style.resample) == "residual" for level in stages)
        multiple = 2 ** (len(stages) - 1) if doubles else 1
        self.inputs = Inputs(
            *("adm", in_channels, multiple, context_dim, pooled_dim, num_classes, low_res_channels),
            low_res_noised=told.low_res_noised,
            size_numbers=told.size_numbers,
        )
        self.out_channels = out_channels or in_channels
        self.told, self.context_width = told, told.text_width or context_dim
        dim = told.dim or 4 * width
        gelu = nn.GELU() if style.activation == "gelu" else None
        waves = (told.frequencies or width, time_scale, told.shift, told.sin_first, gelu)
        self.time = TimestepEmbedder(dim, *waves)
        self.labels = None if num_classes is None else nn.Embedding(num_classes, dim)
        self.low_res_level = None
        if low_res_channels and told.low_res_noised:
            self.low_res_level = TimestepEmbedder(dim, waves[0], 1000.0, *waves[2:])
        self.text_project = self.text_pool = self.micro = None
        if context_dim is not None and told.text_width is not None:
            self.text_project = nn.Linear(context_dim, told.text_width)
            self.text_pool = TextPool(context_dim, dim, told.text_heads)
        if pooled_dim is not None:
            self.facts = pooled_dim + told.size_numbers * told.size_width
            self.micro = nn.Sequential(nn.Linear(self.facts, dim), nn.SiLU(), nn.Linear(dim, dim))
        widths = (in_channels + low_res_channels, self.out_channels)
        self.build(widths, stages, centre, dim, self._attention, style, double=True)
        self.vectors = int(self.text_pool is not None or self.micro is not None)
        self.number_units(self.vectors)

    @staticmethod
    def _check(told: Embedding, context_dim: int | None, pooled_dim: int | None) -> None:
        if told.text_width is not None and context_dim is None:
            raise KitError("adm embedding: text_width is for networks with text; give context_dim too")
        if told.text_width is not None and (pooled_dim is not None or told.text_width % 32):
            raise KitError("adm embedding: text_width must be a multiple of 32, and goes without pooled_dim")
        if told.size_numbers and pooled_dim is None:
            raise KitError("adm embedding: sizes are joined with pooled text; give pooled_dim too")

    def _attention(self, level: Level) -> nn.Module | None:
        """The attention block of a level."""
        if level.attention is False:
            return None
        given = {"head_dim": 64} if level.attention is True else level.attention
        kind, channels, context = spec(Attention, given, "adm attention"), level.channels, self.context_width
        heads = kind.heads_of(channels)
        if context is None and (kind.kind == "transformer" or not kind.cells):
            raise KitError("adm attention of this kind reads text: give context_dim")
        if kind.kind == "transformer" and context is not None:
            norm = self.style.norm(channels, eps=1e-6)
            return SpatialTransformer(channels, context, heads, kind.depth, norm, kind.cells)
        return AttentionBlock(
            channels,
            channels // heads,
            context,
            expansion=0,
            places=False,
            norm=self.style.norm(channels) if kind.norm else nn.Identity(),
            context_norm=None if self.told.text_width is None else nn.GroupNorm(32, self.told.text_width),
            cells=kind.cells,
        )

    def _read(self, cond: Cond) -> tuple[Tensor | None, Tensor | None]:
        """What the text says to the embedding (b, e), and its tokens (b, n, d) for the attention."""
        text, vector = cond.tokens if self.context_width else None, None
        if self.text_project is not None and self.text_pool is not None and text is not None:
            vector = self.text_pool(text) if cond.pooled is None else cond.pooled
            if vector.shape != (len(text), self.embed_dim):
                raise KitError(f"pooled text of shape {tuple(vector.shape)}: this adm pools its text itself")
            text = self.text_project(text)
        if self.micro is not None and cond.pooled is not None:
            vector = self.micro(self._facts(cond.pooled, cond.size))
        return vector, text

    def _embed(self, t: Tensor, cond: Cond) -> tuple[Tensor, Context]:
        """Activated embedding (b, e) of time and conditioning, text tokens (b, n, d) or their memory."""
        emb = self.time(t)
        vector: Tensor | None
        context: Context
        if cond.memory is None:
            vector, context = self._read(cond)
        else:
            vector, context = cond.memory[0] if self.vectors else None, cond.memory
        if self.labels is not None and cond.labels is not None:
            emb = emb + self.labels(cond.labels)
        if vector is not None:
            emb = emb + vector
        if self.low_res_level is not None and cond.low_res_level is not None:
            emb = emb + self.low_res_level(cond.low_res_level)
        return self.style.activate(emb), context

    def _facts(self, pooled: Tensor, size: Tensor | None) -> Tensor:
        """Pooled text (b, p) and the sinusoids of the size numbers (b, k): (b, p + k·size_width)."""
        told, facts = self.told, pooled
        if told.size_numbers and size is not None:
            waves = timestep_embedding(
                size.flatten(), told.size_width, shift=told.shift, sin_first=told.sin_first
            )
            facts = torch.cat([pooled, waves.view(len(size), -1).to(pooled.dtype)], dim=1)
        if facts.shape[1] != self.facts:
            raise KitError(
                f"this adm is told pooled text and {told.size_numbers} sizes ({self.facts} numbers once they are "
                f"embedded), not {facts.shape[1]}: give cond.pooled and cond.size"
            )
        return facts

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: what the text says to the embedding, and every layer's keys and values of it."""
        self.inputs.check_text(cond)
        vector, text = self._read(cond)
        return cond if vector is None and text is None else remember(self, cond, text, vector)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture; sides of any length, but where residual blocks resample
                multiples of 2^(levels - 1).
            t: (b,) native times.
            cond: conditioning; the parts the network was built with must be present. Where the network pools
                its text itself (IF), ``pooled`` may hold ``text_pool(other_tokens)`` (b, e) to take its place.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        emb, context = self._embed(t, cond)
        return self.run(self.inputs.picture(x, cond), emb, context, cond.mask)

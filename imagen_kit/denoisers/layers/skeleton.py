"""The U-Net's skeleton: levels down, a middle, levels up, every output on the way down kept for the way up.

Ronneberger et al. 2015, in the form of Ho et al. 2020 that all diffusion U-Nets share. What differs between them is
a ``Style`` (how blocks are made) and, per ``Level``, what stands there; the skeleton itself is the same.

Axes: b batch, c channels, h w picture, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_kit.denoisers.layers.blocks import OWN, RESAMPLES, Grow, ResBlock, Shrink, Style, zeroed
from imagen_kit.denoisers.layers.context import Context, number, share
from imagen_kit.denoisers.layers.inner import inner, place
from imagen_kit.errors import KitError, unknown

S = TypeVar("S")
Rung = tuple[nn.Module, nn.Module, nn.Module | None]
KINDS = ("plain", "transformer")
RUNTIME = {"checkpointing": False, "channels_last": False}


def spec(kind: type[S], value: S | Mapping[str, Any], what: str) -> S:
    """A spec from itself or from a mapping of its fields; KitError names the fields there are."""
    if isinstance(value, kind):
        return value
    names = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise KitError(f"{what} {value!r}: must be a mapping of {names}")
    try:
        return kind(**value)
    except TypeError as error:
        raise KitError(f"{what} {dict(value)!r}: takes {names} ({error})") from None


@dataclass(frozen=True)
class Attention:
    """The attention block after a residual block.

    Attributes:
        kind: ``plain``: one attention whose keys the text joins (ADM, IF, DDPM); ``transformer``: a spatial
            transformer (Stable Diffusion).
        heads: number of heads; or
        head_dim: width of a head. One of the two is given.
        cells: whether cells attend to each other, or to the text alone (IF's second stage; in a transformer,
            Stable Diffusion's 4× upscaler).
        depth: blocks of a transformer.
        norm: whether the cells are normalised first (diffusers' UNet2DModel leaves it out in one middle).
    """

    kind: str = "plain"
    heads: int | None = None
    head_dim: int | None = None
    cells: bool = True
    depth: int = 1
    norm: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KitError(unknown("U-Net attention", self.kind, KINDS))
        if (self.heads is None) == (self.head_dim is None):
            raise KitError("U-Net attention: give either heads or head_dim")

    def heads_of(self, channels: int) -> int:
        """Number of heads at this width; KitError where it does not divide."""
        if self.heads is not None:
            if channels % self.heads:
                raise KitError(f"U-Net level of {channels} channels: {self.heads} heads must divide them")
            return self.heads
        assert self.head_dim is not None
        if channels % self.head_dim:
            raise KitError(f"U-Net level of {channels} channels: head_dim {self.head_dim} must divide it")
        return channels // self.head_dim


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net.

    Attributes:
        channels: width.
        blocks: residual blocks on the way down (one more on the way up).
        attention: whether an attention block, joined with text where there is text, follows each of them, and
            where the network leaves the choice, which.
        dropout: probability inside the residual blocks.
        resample: how the way leaves this level, down and up, where not in the network's style.
    """

    channels: int
    blocks: int = 2
    attention: bool | Attention | Mapping[str, Any] = False
    dropout: float = 0.0
    resample: str | None = None

    def __post_init__(self) -> None:
        if self.resample not in (None, *RESAMPLES):
            raise KitError(unknown("U-Net resample", self.resample, RESAMPLES))

    @staticmethod
    def of(value: Level | Mapping[str, Any]) -> Level:
        """A level from itself or from a mapping of its fields."""
        return spec(Level, value, "unet level")


class Unit(nn.Module):
    """A residual block, at attention levels the attention block after it, in some middles a second one."""

    def __init__(self, res: ResBlock, attention: nn.Module | None, after: ResBlock | None = None):
        super().__init__()
        self.res, self.attention, self.after = res, attention, after

    def forward(self, x: Tensor, emb: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """(b, c, h, w), embedding (b, e), the block's share of the text, mask (b, n) bool → (b, out, h, w)."""
        x = self.res(x, emb)
        if self.attention is not None:
            x = self.attention(x, context, mask)
        return x if self.after is None else self.after(x, emb)


class Skeleton(nn.Module):
    """Base of the U-Nets: ``build`` makes the blocks, ``run`` runs them. A subclass adds what it is told.

    Keys: ``stem``, ``down.{level}.{block}.res|attention``, ``shrink.{level}``, ``middle.res|attention|after``,
    ``up`` and ``grow`` likewise from coarse to fine, ``norm_out``, ``head``.
    """

    def __init__(self, runtime: Mapping[str, bool] | None = None):
        super().__init__()
        for option in runtime or {}:
            if option not in RUNTIME:
                raise KitError(f"unet runtime option {option!r}; choose from {', '.join(RUNTIME)}")
        options = {**RUNTIME, **(runtime or {})}
        self.checkpointing, self.channels_last = options["checkpointing"], options["channels_last"]

    def build(
        self,
        widths: tuple[int, int],
        levels: Sequence[Level],
        middle: Level,
        embed_dim: int,
        attention: Callable[[Level], nn.Module | None],
        style: Style = OWN,
        double: bool = False,
    ) -> None:
        """Make all blocks.

        Args:
            widths: channels of the picture in and out.
            levels: from fine to coarse; the side halves from one to the next.
            middle: its attention and dropout, at the coarsest level's width.
            embed_dim: width of the embedding.
            attention: the attention block of a level, or None.
            style: of all blocks.
            double: the middle has a second residual block after its attention (all but ours).
        """
        self.style, self.embed_dim = style, embed_dim
        width = levels[0].channels
        self.stem = nn.Conv2d(widths[0], width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips, channels = [width], width
        for i, level in enumerate(levels):
            units = nn.ModuleList()
            for _ in range(level.blocks):
                units.append(Unit(self._res(channels, level), attention(level)))
                channels = level.channels
                skips.append(channels)
            self.down.append(units)
            if i < len(levels) - 1:
                self.shrink.append(self._shrink(level))
                skips.append(channels)
        res = self._res(channels, middle)
        self.middle = Unit(res, attention(middle), self._res(channels, middle) if double else None)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, level in reversed(list(enumerate(levels))):
            units = nn.ModuleList()
            for _ in range(level.blocks + 1):
                units.append(Unit(self._res(channels + skips.pop(), level), attention(level)))
                channels = level.channels
            self.up.append(units)
            if i:
                self.grow.append(self._grow(level, levels[i - 1]))
                channels = self._grown(level, levels[i - 1])
        self.norm_out = style.norm(channels)
        self.head = zeroed(nn.Conv2d(channels, widths[1], 3, padding=1))
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _res(self, channels: int, level: Level, resample: str | None = None) -> ResBlock:
        return ResBlock(channels, level.channels, self.embed_dim, level.dropout, self.style, resample)

    def _shrink(self, level: Level) -> nn.Module:
        kind = level.resample or self.style.resample
        if kind == "residual":
            return self._res(level.channels, level, "down")
        return Shrink(level.channels, asymmetric=kind == "asymmetric")

    def _grow(self, level: Level, finer: Level) -> nn.Module:
        if (level.resample or self.style.resample) == "residual":
            return self._res(level.channels, level, "up")
        return Grow(level.channels, self._grown(level, finer))

    def _grown(self, level: Level, finer: Level) -> int:
        """Channels once the picture has grown: narrowing, which spares work, as that is four times as large."""
        narrowing = (level.resample or self.style.resample) == "narrowing"
        return finer.channels if narrowing else level.channels

    def number_units(self, first: int) -> None:
        """Find every unit's place in a text memory of which the network keeps the ``first`` tensors itself."""
        number((part for part in self.modules() if isinstance(part, Unit)), first)

    def _apply_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return block(*inputs)

    @property
    def shares(self) -> list[float]:
        """By place, the share of units that lies inside it; see ``layers.inner``."""
        outside = [sum(isinstance(part, Unit) for part in rung) for rung in self._rungs()]
        total = sum(outside) + 1
        return [1 - sum(outside[: k + 1]) / total for k in range(len(outside))]

    def _rungs(self) -> list[Rung]:
        """From the outermost: what fills each skip connection, what reads it, what grows the picture after that."""
        down = [
            part
            for i, units in enumerate(self.down)
            for part in (self.shrink[i - 1] if i else self.stem, *units)  # type: ignore[misc]
        ]
        up: list[tuple[nn.Module, nn.Module | None]] = []
        for i, units in enumerate(self.up):
            every: list[nn.Module] = list(units)  # type: ignore[call-overload]
            up += [(unit, None) for unit in every[:-1]]
            up.append((every[-1], self.grow[i] if i < len(self.grow) else None))
        return [(part, *ends) for part, ends in zip(down, reversed(up), strict=True)]

    def run(self, x: Tensor, emb: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """(b, in, h, w), activated embedding (b, e), text (b, n, d), mask (b, n) bool → (b, out, h, w).

        In place of the text there may be the memory of what was made of it, see ``layers.context``.
        """
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        rungs, told = self._rungs(), (emb, context, mask)
        cut = place(len(rungs))
        skips: list[Tensor] = []
        x = self._down(rungs[:cut], skips, x, *told)
        x = inner(partial(self._inside, rungs[cut:]), x, told)
        x = self._up(rungs[:cut], skips, x, *told)
        return self.head(self.style.activate_fresh(self.norm_out(x)))

    def _inside(self, rungs: list[Rung], x: Tensor, *told: Any) -> Tensor:
        """What the innermost of the outer skip connections (b, c, h, w) is joined with on the way up."""
        skips = [x]
        x = self._down(rungs, skips, x, *told)
        x = self._unit(self.middle, x, *told)
        return self._up(rungs, skips, x, *told)

    def _down(self, rungs: list[Rung], skips: list[Tensor], x: Tensor, *told: Any) -> Tensor:
        """Fill skip connections from the outermost on; the last of them."""
        for part, _, _ in rungs:
            if isinstance(part, Unit):
                x = self._unit(part, x, *told)
            else:
                x = self.stem(x) if part is self.stem else self._apply_block(part, x, told[0])
            skips.append(x)
        return x

    def _up(self, rungs: list[Rung], skips: list[Tensor], x: Tensor, *told: Any) -> Tensor:
        """Read skip connections, the innermost first."""
        for _, unit, grow in reversed(rungs):
            x = torch.cat([x, skips.pop()], dim=1)  # neither of the two is held while the unit works
            x = self._unit(unit, x, *told)
            if grow is not None:
                x = self._apply_block(grow, x, told[0], skips[-1].shape[-2:])
        return x

    def _unit(self, unit: nn.Module, x: Tensor, emb: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        return self._apply_block(unit, x, emb, share(context, unit), mask)

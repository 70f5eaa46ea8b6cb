"""PixArt-α and Σ (Chen et al. 2023, 2024): DiT's blocks with text by cross-attention and one shared modulation.

Axes: b batch, c channels, h w picture, n patches, m text tokens, d width, p patch side, k size numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.context import Context, number, remember, share
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.inner import run_blocks, shares
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.joint import check_sizes, chosen, from_patches, initialise
from imagen_kit.denoisers.layers.transformer import (
    CompressedAttention,
    CrossAttention,
    Mlp,
    PatchEmbed,
    SelfAttention,
    gated,
    modulate,
    sincos_positions,
)
from imagen_kit.errors import KitError

RUNTIME = {"checkpointing": False, "channels_last": False}
DETAILS: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "grid": 32,
    "interpolation": 1.0,
    "compress": 1,
    "compressed": (),
}
SIZES = 3  # numbers of the micro-conditioning: height and width in pixels, height / width
Runtime = Mapping[str, bool] | None


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class PixArtBlock(nn.Module):
    """DiT's block with adaLN-single: what is modulated by is shared, and each block adds a table to it (§2.3).

    Where ``compress`` is above 1 its keys and values are those of a grid coarser by that.
    """

    is_residual = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, mlp_ratio: float, compress: int = 1):
        super().__init__()
        self.norm1 = _norm(dim)
        self.attn = SelfAttention(dim, heads) if compress == 1 else CompressedAttention(dim, heads, compress)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = _norm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, c: Tensor, text: Context, mask: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """Patches (b, n, d), modulation (b, 6, d), its share of the text, mask (b, m), sides → (b, n, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + c).unbind(1)
        cells = modulate(self.norm1(x), shift1, scale1)
        within = self.attn(cells, grid) if isinstance(self.attn, CompressedAttention) else self.attn(cells)
        x = gated(x, gate1, within)
        x = x + self.cross_attn(x, text, mask)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to the pixels of its patch."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = _norm(dim)
        self.linear = nn.Linear(dim, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(b, n, d), (b, d) → (b, n, p·p·c)."""
        shift, scale = (self.scale_shift_table + c[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class CaptionProjection(nn.Module):
    """Linear–GELU–Linear from the text encoder's tokens to those that the blocks read."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.fc1 = LinearGelu(dim, out, "tanh")
        self.fc2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """(b, m, dim) → (b, m, out)."""
        return self.fc2(self.fc1(x))


class CaptionEmbedder(nn.Module):
    """Text tokens, projected; with a caption for "no text" where there is one.

    Args:
        dim: width of text tokens.
        out: width of a token.
        null_tokens: length of that caption, 0 for none. It is not trained, as in the official code.
    """

    def __init__(self, dim: int, out: int, null_tokens: int):
        super().__init__()
        self.y_proj = CaptionProjection(dim, out)
        self.y_embedding: Tensor | None
        self.register_buffer("y_embedding", torch.randn(null_tokens, dim) / dim**0.5 if null_tokens else None)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(b, m, dim), (b, m) → (b, m, out) and mask; prompts without any token are replaced by "no text"."""
        if self.y_embedding is not None and mask is not None:
            m = tokens.shape[1]
            null = self.y_embedding[:m].to(tokens.dtype)
            there = torch.arange(m, device=mask.device) < len(null)
            dropped = ~mask.any(1, keepdim=True)
            null = F.pad(null, (0, 0, 0, m - len(null)))
            tokens = torch.where(dropped[..., None], null, tokens)
            mask = mask | (dropped & there)
        return self.y_proj(tokens), mask


@register("pixart")
class PixArt(nn.Module):
    """PixArt: diffusion transformer whose patches attend to text; text is required.

    Positions are sines and cosines of the actual grid, stretched to that of training, so any sides that the patch
    divides will do. Modules are named as in the official code.

    Args:
        in_channels: channels of x.
        learn_sigma: answer with twice the channels, the second half for a learned variance.
        patch_size: side of a patch.
        width: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        context_dim: width of text tokens.
        sizes: whether it is told the picture's size in ``cond.size``, (b, 3): height and width in pixels, height
            / width (PixArt-α at 1024²).
        null_tokens: length of a caption of its own that stands for dropped text, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; patchify in channels-last memory.
        details: ``mlp_ratio``: width of the MLP in widths of a token; ``grid``: side of the grid of training, in
            patches; ``interpolation``: how many of its cells make a step of one; ``compress``: cells of a side
            that are one key and value in the blocks ``compressed``, a list of their numbers from 0 (PixArt-Σ).

    Raises:
        KitError: a width that heads do not divide, an unknown option; when called, a missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        learn_sigma: bool = False,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        context_dim: int = 4096,
        sizes: bool = False,
        null_tokens: int = 0,
        time_scale: float = 1.0,
        runtime: Runtime = None,
        details: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        options = chosen("pixart runtime option", runtime, RUNTIME)
        variant = chosen("pixart detail", details, DETAILS)
        check_sizes("pixart", width, heads, patch_size=patch_size, depth=depth, grid=variant["grid"])
        if width % 4 or (sizes and width % SIZES):
            parts = "12 for its positions and sizes" if sizes else "4 for its positions"
            raise KitError(f"pixart width {width} must be a multiple of {parts}")
        self.checkpointing, self.channels_last = options["checkpointing"], options["channels_last"]
        self.inputs = Inputs(
            "pixart", in_channels, patch_size, context_dim, size_numbers=SIZES if sizes else 0
        )
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size, self.width = patch_size, width
        self.grid, self.interpolation = variant["grid"], float(variant["interpolation"])

        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.t_embedder = TimestepEmbedder(width, scale=time_scale)
        self.csize_embedder = TimestepEmbedder(width // SIZES) if sizes else None
        self.ar_embedder = TimestepEmbedder(width // SIZES) if sizes else None
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(context_dim, width, null_tokens)
        ratios = _ratios(depth, variant["compress"], variant["compressed"])
        self.blocks = nn.ModuleList(PixArtBlock(width, heads, variant["mlp_ratio"], r) for r in ratios)
        number(self.blocks, first=int(sizes))
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels)
        self._initialise()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """As DiT; the gates start at the blocks' tables, so only cross-attention and the answer are zero."""
        initialise(self)
        for layer in (self.t_block[1], self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for block in self.blocks:
            zeroed(block.cross_attn.proj)  # type: ignore[union-attr,arg-type]
        zeroed(self.final_layer.linear)

    def _sizes(self, cond: Cond) -> Tensor | None:
        """The vector (b, d) of the picture's size, where the network is told it."""
        if self.csize_embedder is None or self.ar_embedder is None or cond.size is None:
            return None
        sides = self.csize_embedder(cond.size[:, :2].flatten()).unflatten(0, (-1, 2)).flatten(1)
        return torch.cat([sides, self.ar_embedder(cond.size[:, 2])], dim=1)

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the vector of sizes and every block's keys and values of the text."""
        self.inputs.check_text(cond)
        assert cond.tokens is not None
        text, mask = self.y_embedder(cond.tokens, cond.mask)
        return remember(self, replace(cond, mask=mask), text, self._sizes(cond))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture.
            t: (b,) native times.
            cond: text tokens, their mask (None: all are attended to), sizes where it is told them.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        assert cond.tokens is not None
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        text: Context
        if cond.memory is None:
            sizes = self._sizes(cond)
            text, mask = self.y_embedder(cond.tokens, cond.mask)
        else:
            sizes = None if self.csize_embedder is None else cond.memory[0]
            text, mask = cond.memory, cond.mask
        c = self.t_embedder(t)
        if sizes is not None:
            c = c + sizes
        shared = self.t_block(c).unflatten(1, (6, -1))
        tokens = self.x_embedder(x)
        steps = (self.grid / h / self.interpolation, self.grid / w / self.interpolation)
        tokens = tokens + sincos_positions(h, w, self.width, x.device, steps).to(tokens.dtype)
        block = partial(self._block, grid=(h, w))
        tokens = run_blocks(block, len(self.blocks), tokens, (shared, text, mask))
        return from_patches(self.final_layer(tokens, c), h, w, self.patch_size)

    def _block(
        self,
        i: int,
        tokens: Tensor,
        shared: Tensor,
        text: Context,
        mask: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        """Tokens (b, n, d) of a grid of (h, w) cells after block ``i``."""
        told = shared, share(text, self.blocks[i]), mask, grid
        if self.checkpointing and self.training:
            return checkpoint(self.blocks[i], tokens, *told, use_reentrant=False)  # type: ignore[return-value]
        return self.blocks[i](tokens, *told)

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        return shares(len(self.blocks))


def _ratios(depth: int, compress: Any, compressed: Any) -> list[int]:
    """By how much each block compresses its keys and values."""
    if isinstance(compress, bool) or not isinstance(compress, int) or compress < 1:
        raise KitError(f"pixart compress must be a whole number of at least 1, got {compress!r}")
    wrong = [i for i in compressed if i not in range(depth)]
    if wrong:
        raise KitError(
            f"pixart compressed: there is no block {wrong[0]!r}; they are numbered 0 to {depth - 1}"
        )
    return [compress if i in compressed else 1 for i in range(depth)]


def _published(grid: int, interpolation: float, sizes: bool = False, **options: Any) -> PixArt:
    details = {"grid": grid, "interpolation": interpolation}
    return PixArt(4, True, 2, 1152, 28, 16, 4096, sizes, details=details, **options)


def _sampling(tokens: int) -> dict[str, Any]:
    return {
        "sampling": {
            "schedule": {"name": "linear", "timesteps": 1000},
            "prediction": "eps",
            "variance": "learned_range",
            "sampler": "dpmpp_2m",
            "steps": 20,
            "guidance": {"name": "cfg", "scale": 4.5},
            "tokens": tokens,
        }
    }


@register("pixart_xl_2", **_sampling(120))
def pixart_xl_2(null_tokens: int = 0, time_scale: float = 1.0, runtime: Runtime = None) -> PixArt:
    """PixArt-α XL/2 for 512²: 28 blocks of width 1152, 611 M parameters."""
    return _published(32, 1.0, null_tokens=null_tokens, time_scale=time_scale, runtime=runtime)


@register("pixart_xl_2_1024", **_sampling(120))
def pixart_xl_2_1024(null_tokens: int = 0, time_scale: float = 1.0, runtime: Runtime = None) -> PixArt:
    """PixArt-α XL/2 for 1024² and all aspect ratios, told its size: 611 M parameters."""
    return _published(64, 2.0, True, null_tokens=null_tokens, time_scale=time_scale, runtime=runtime)


@register("pixart_xl_2_sigma", **_sampling(300))
def pixart_xl_2_sigma(null_tokens: int = 0, time_scale: float = 1.0, runtime: Runtime = None) -> PixArt:
    """PixArt-Σ XL/2 for 1024²: 28 blocks of width 1152, 611 M parameters; 300 tokens of text."""
    return _published(64, 2.0, null_tokens=null_tokens, time_scale=time_scale, runtime=runtime)


@register("pixart_xl_2_sigma_2k", **_sampling(300))
def pixart_xl_2_sigma_2k(null_tokens: int = 0, time_scale: float = 1.0, runtime: Runtime = None) -> PixArt:
    """PixArt-Σ XL/2 for 2048²: 611 M parameters; as published, without compressed keys and values."""
    return _published(128, 4.0, null_tokens=null_tokens, time_scale=time_scale, runtime=runtime)

"""The diffusion transformer DiT (Peebles & Xie 2023): adaLN-Zero blocks over patches; labels, text or both.

Axes: b batch, c channels, h w picture, n patches, m text tokens, d width, p patch side.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.context import Context, number, remember, share
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.inner import run_blocks, shares
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.text import TextAdapter
from imagen_kit.denoisers.layers.transformer import (
    CrossAttention,
    Mlp,
    PatchEmbed,
    SelfAttention,
    gated,
    modulate,
    sincos_positions,
)
from imagen_kit.errors import KitError, unknown

RUNTIME = {"checkpointing": False, "channels_last": False}
DETAILS: dict[str, float] = {
    "frequency_shift": 0.0,
    "mlp_norm_eps": 1e-6,
    "mlp_ratio": 4.0,
    "null_class": True,
    "block_embedders": False,
}
TEXT_HEAD = 32  # head width of the text adapter, which must divide the width of a network with text


class LabelEmbedder(nn.Module):
    """A vector per class and, unless ``null_class`` is False, one more, the last, for "no class"."""

    def __init__(self, num_classes: int, dim: int, null_class: bool = True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(b,) int64 → (b, dim)."""
        return self.embedding_table(labels)


class OwnEmbedder(nn.Module):
    """Time and label embedder of one block alone: diffusers keeps such a pair in every block."""

    def __init__(self, dim: int, num_classes: int, details: Mapping[str, Any], scale: float):
        super().__init__()
        self.t_embedder = TimestepEmbedder(dim, scale=scale, shift=details["frequency_shift"])
        self.y_embedder = LabelEmbedder(num_classes, dim, details["null_class"])

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        """(b,), (b,) → (b, dim)."""
        return self.t_embedder(t) + self.y_embedder(labels)


def _norm(dim: int, eps: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=eps)


class DiTBlock(nn.Module):
    """Self-attention and MLP, both shifted, scaled and gated by the conditioning (adaLN-Zero, §3.2).

    With text, PixArt-α's cross-attention to the tokens stands between the two (Chen et al. 2023, Fig. 4). Its
    queries are normalised, unlike those of PixArt, which starts from a trained DiT; its last layer starts at
    zero like the gates.
    """

    is_residual = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, text: bool, details: Mapping[str, Any] = DETAILS):
        super().__init__()
        self.norm1 = _norm(dim)
        self.attn = SelfAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6) if text else None
        self.cross_attn = CrossAttention(dim, heads) if text else None
        self.norm2 = _norm(dim, details["mlp_norm_eps"])
        self.mlp = Mlp(dim, details["mlp_ratio"])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """Patches (b, n, d), conditioning (b, d), the block's share of the text, mask (b, m) → (b, n, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        if self.norm_cross is not None and self.cross_attn is not None and context is not None:
            x = x + self.cross_attn(self.norm_cross(x), context, mask)
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to the pixels of its patch."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = _norm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(b, n, d), (b, d) → (b, n, p·p·c)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _chosen(what: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    for name in given or {}:
        if name not in defaults:
            raise KitError(unknown(f"dit {what}", name, defaults))
    return {**defaults, **(given or {})}


@register("dit")
class DiT(nn.Module):
    """DiT: transformer over patches with adaLN-Zero conditioning, class labels, and text by cross-attention.

    Positions are fixed sines and cosines of the actual grid, so any sides that the patch divides will do.
    Modules are named as in the official code, whose checkpoints fit but for ``pos_embed``, computed here.

    Args:
        in_channels: channels of x.
        learn_sigma: answer with twice the channels, the second half for a learned variance.
        patch_size: side of a patch.
        width: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, None where it has none.
        text_depth: trained transformer layers between the frozen text features and the attention.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        low_res_channels: channels of the low-resolution picture of a super-resolution stage, 0 for none.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; patchify in channels-last memory.
        details: where published variants differ; the defaults are the official code's.
            ``frequency_shift``: of the time embedding (diffusers: 1); ``mlp_norm_eps``: epsilon of the norm
            before the MLP (diffusers: 1e-5); ``mlp_ratio``: width of the MLP in widths of a token;
            ``null_class``: there is a vector for "no class"; ``block_embedders``: every block has time and
            label embedders of its own, the last layer those of the first block (diffusers).

    Raises:
        KitError: a width that heads do not divide, an unknown runtime option or detail; when called, a
            missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        learn_sigma: bool = False,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        text_depth: int = 0,
        num_classes: int | None = None,
        low_res_channels: int = 0,
        time_scale: float = 1.0,
        runtime: Mapping[str, bool] | None = None,
        details: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self._check(patch_size, width, depth, heads, context_dim is not None)
        options = _chosen("runtime option", runtime, RUNTIME)
        variant = _chosen("detail", details, DETAILS)
        if variant["block_embedders"] and num_classes is None:
            raise KitError("dit detail 'block_embedders' needs class labels: give num_classes")
        self.checkpointing, self.channels_last = options["checkpointing"], options["channels_last"]
        self.inputs = Inputs(
            "dit", in_channels, patch_size, context_dim, pooled_dim, num_classes, low_res_channels
        )
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size, self.width = patch_size, width

        self.x_embedder = PatchEmbed(in_channels + low_res_channels, width, patch_size)
        self.t_embedder = self.y_embedder = self.embedders = None
        if variant["block_embedders"]:
            self.embedders = nn.ModuleList(
                OwnEmbedder(width, num_classes or 0, variant, time_scale) for _ in range(depth)
            )
        else:
            self.t_embedder = TimestepEmbedder(width, scale=time_scale, shift=variant["frequency_shift"])
            if num_classes is not None:
                self.y_embedder = LabelEmbedder(num_classes, width, bool(variant["null_class"]))
        self.low_res_level = TimestepEmbedder(width, scale=1000.0) if low_res_channels else None
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, context_dim is not None, variant) for _ in range(depth)
        )
        number(self.blocks, first=1)
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels)
        self._initialise()
        # last, as it has an initialisation of its own
        self.text = (
            None if context_dim is None else TextAdapter(context_dim, width, width, pooled_dim, text_depth)
        )
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _check(patch_size: int, width: int, depth: int, heads: int, text: bool) -> None:
        for name, value in (("patch_size", patch_size), ("width", width), ("depth", depth), ("heads", heads)):
            if value < 1:
                raise KitError(f"dit {name} must be at least 1, not {value}")
        if width % heads:
            raise KitError(f"dit width {width} must be a multiple of heads ({heads})")
        if width % 4:
            raise KitError(f"dit width {width} must be a multiple of 4 for its positions")
        if text and width % TEXT_HEAD:
            raise KitError(f"dit width {width} must be a multiple of {TEXT_HEAD} where it reads text")

    def _initialise(self) -> None:
        """Xavier for matrices, 0.02 for embeddings, zero for everything that ends a residual branch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # a matrix in the shape of a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)  # type: ignore[arg-type]
                nn.init.normal_(module.mlp[2].weight, std=0.02)  # type: ignore[arg-type]
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
        for block in self.blocks:
            zeroed(block.adaLN_modulation[1])  # type: ignore[index,union-attr,arg-type]
            if block.cross_attn is not None:
                zeroed(block.cross_attn.proj)  # type: ignore[union-attr,arg-type]
        zeroed(self.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        zeroed(self.final_layer.linear)

    def _condition(self, t: Tensor, cond: Cond) -> tuple[list[Tensor], Context]:
        """Per block the sum (b, d) of all vectors it is modulated by; adapted text (b, m, d) or its memory."""
        if self.embedders is not None:
            vectors = [embedder(t, cond.labels) for embedder in self.embedders]
        else:
            assert self.t_embedder is not None
            c = self.t_embedder(t)
            if self.y_embedder is not None and cond.labels is not None:
                c = c + self.y_embedder(cond.labels)
            vectors = [c] * len(self.blocks)
        context: Context = cond.memory
        if self.text is not None and cond.tokens is not None:
            if cond.memory is None:
                context, vector = self.text(cond.tokens, cond.mask, cond.pooled)
            else:
                vector = cond.memory[0]
            vectors = [c + vector for c in vectors]
        if self.low_res_level is not None and cond.low_res_level is not None:
            level = self.low_res_level(cond.low_res_level)
            vectors = [c + level for c in vectors]
        return vectors, context

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text adapted and pooled, and every block's keys and values of it."""
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
        picture = self.inputs.picture(x, cond)
        vectors, context = self._condition(t, cond)
        if self.channels_last:
            picture = picture.contiguous(memory_format=torch.channels_last)
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        tokens = self.x_embedder(picture)
        tokens = tokens + sincos_positions(h, w, self.width, x.device).to(tokens.dtype)
        tokens = run_blocks(self._block, len(self.blocks), tokens, (vectors, context, cond.mask))
        out, p = self.final_layer(tokens, vectors[0]), self.patch_size
        patches = out.unflatten(1, (h, w)).unflatten(3, (p, p, -1))  # b h w p p c
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _block(
        self, i: int, tokens: Tensor, vectors: list[Tensor], context: Context, mask: Tensor | None
    ) -> Tensor:
        """Tokens (b, n, d) after block ``i``."""
        told = vectors[i], share(context, self.blocks[i]), mask
        if self.checkpointing and self.training:
            return checkpoint(self.blocks[i], tokens, *told, use_reentrant=False)  # type: ignore[return-value]
        return self.blocks[i](tokens, *told)

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        return shares(len(self.blocks))


def _size(name: str) -> Callable[[Callable[..., DiT]], Callable[..., DiT]]:
    """Register a size; it takes the options of ``DiT`` that do not define it, and shows exactly those."""

    def add(build: Callable[..., DiT]) -> Callable[..., DiT]:
        signature = inspect.signature(DiT)
        fixed = ("patch_size", "width", "depth", "heads")
        open_options = [p for key, p in signature.parameters.items() if key not in fixed]
        build.__signature__ = signature.replace(parameters=open_options)  # type: ignore[attr-defined]
        build.__annotations__ = {p.name: p.annotation for p in open_options} | {"return": "DiT"}
        return register(name)(build)

    return add


@_size("dit_s_2")
def dit_s_2(**options) -> DiT:
    """DiT-S/2: 12 blocks of width 384, 33 M parameters."""
    return DiT(patch_size=2, width=384, depth=12, heads=6, **options)


@_size("dit_s_4")
def dit_s_4(**options) -> DiT:
    """DiT-S/4: 12 blocks of width 384, 33 M parameters."""
    return DiT(patch_size=4, width=384, depth=12, heads=6, **options)


@_size("dit_s_8")
def dit_s_8(**options) -> DiT:
    """DiT-S/8: 12 blocks of width 384, 33 M parameters."""
    return DiT(patch_size=8, width=384, depth=12, heads=6, **options)


@_size("dit_b_2")
def dit_b_2(**options) -> DiT:
    """DiT-B/2: 12 blocks of width 768, 130 M parameters."""
    return DiT(patch_size=2, width=768, depth=12, heads=12, **options)


@_size("dit_b_4")
def dit_b_4(**options) -> DiT:
    """DiT-B/4: 12 blocks of width 768, 130 M parameters."""
    return DiT(patch_size=4, width=768, depth=12, heads=12, **options)


@_size("dit_b_8")
def dit_b_8(**options) -> DiT:
    """DiT-B/8: 12 blocks of width 768, 131 M parameters."""
    return DiT(patch_size=8, width=768, depth=12, heads=12, **options)


@_size("dit_l_2")
def dit_l_2(**options) -> DiT:
    """DiT-L/2: 24 blocks of width 1024, 458 M parameters."""
    return DiT(patch_size=2, width=1024, depth=24, heads=16, **options)


@_size("dit_l_4")
def dit_l_4(**options) -> DiT:
    """DiT-L/4: 24 blocks of width 1024, 458 M parameters."""
    return DiT(patch_size=4, width=1024, depth=24, heads=16, **options)


@_size("dit_l_8")
def dit_l_8(**options) -> DiT:
    """DiT-L/8: 24 blocks of width 1024, 459 M parameters."""
    return DiT(patch_size=8, width=1024, depth=24, heads=16, **options)


@_size("dit_xl_2")
def dit_xl_2(**options) -> DiT:
    """DiT-XL/2: 28 blocks of width 1152, 675 M parameters."""
    return DiT(patch_size=2, width=1152, depth=28, heads=16, **options)


@_size("dit_xl_4")
def dit_xl_4(**options) -> DiT:
    """DiT-XL/4: 28 blocks of width 1152, 675 M parameters."""
    return DiT(patch_size=4, width=1152, depth=28, heads=16, **options)


@_size("dit_xl_8")
def dit_xl_8(**options) -> DiT:
    """DiT-XL/8: 28 blocks of width 1152, 676 M parameters."""
    return DiT(patch_size=8, width=1152, depth=28, heads=16, **options)

"""U-ViT (Bao et al. 2023): a plain transformer to which time, label, text and patches are all tokens.

Axes: b batch, c channels, h w picture, n tokens of all sorts, m text tokens, d width, p patch side.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagen_kit.attention import attention
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.embeddings import timestep_embedding
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture
from imagen_kit.denoisers.layers.inner import inner, place
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.joint import check_sizes, chosen, from_patches
from imagen_kit.denoisers.layers.transformer import PatchEmbed
from imagen_kit.errors import KitError

RUNTIME = {"checkpointing": False, "channels_last": False}
DETAILS: dict[str, Any] = {"mlp_ratio": 4.0, "qkv_bias": False, "conv": True, "grid": 16, "text_tokens": 77}
Runtime = Mapping[str, bool] | None
Pair = tuple[nn.Module, nn.Module]  # a block of the first half and its mirror image


class Attention(nn.Module):
    """Multi-head self-attention of all tokens."""

    is_self_attention = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, n, d), mask (b, n) bool → (b, n, d)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_dim)
        return self.proj(join_heads(attention(q, k, v, mask)))


class Mlp(nn.Module):
    """Linear–GELU–Linear, GELU exact."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = LinearGelu(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        return self.fc2(self.fc1(x))


class UViTBlock(nn.Module):
    """A pre-norm transformer block; in the second half it first joins the tokens of its mirror image in the first.

    Joining is a projection of both, concatenated: the best of the ways compared in the paper's Fig. 2a.
    """

    def __init__(self, dim: int, heads: int, details: Mapping[str, Any], skip: bool = False):
        super().__init__()
        self.is_residual = not skip  # read by guidance that changes layers
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, details["qkv_bias"])
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * details["mlp_ratio"]))

    def forward(self, x: Tensor, mask: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """Tokens (b, n, d), mask (b, n) bool, tokens of the first half (b, n, d) → (b, n, d)."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


@register("uvit")
class UViT(nn.Module):
    """U-ViT: all inputs are tokens of one transformer, whose second half is told the first's by long skips.

    Learned positions belong to the grid of training; those of other grids are interpolated. Modules are named as
    in the official code. Text with labels is this project's addition: the code has either.

    Args:
        in_channels: channels of x.
        learn_sigma: answer with twice the channels, the second half for a learned variance.
        patch_size: side of a patch.
        width: width of a token.
        depth: number of blocks without the middle one, even: half of them before it, half after.
        heads: attention heads of a block.
        context_dim: width of text tokens; None for a network without text.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; run convolutions in channels-last memory.
        details: ``mlp_ratio``: width of the MLP in widths of a token; ``qkv_bias``; ``conv``: a 3×3 convolution
            at the end (the published networks over latents have none); ``grid``: side of the grid of training, in
            patches; ``text_tokens``: how many text tokens have positions.

    Raises:
        KitError: a width that heads do not divide, an odd depth, an unknown option; when called, a missing or
            misshapen input, more text tokens than have positions.
    """

    def __init__(
        self,
        in_channels: int = 3,
        learn_sigma: bool = False,
        patch_size: int = 2,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        context_dim: int | None = None,
        num_classes: int | None = None,
        time_scale: float = 1.0,
        runtime: Runtime = None,
        details: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        options = chosen("uvit runtime option", runtime, RUNTIME)
        variant = chosen("uvit detail", details, DETAILS)
        check_sizes("uvit", width, heads, patch_size=patch_size, depth=depth, grid=variant["grid"])
        if depth % 2 or width % 2:
            what, value = ("depth", depth) if depth % 2 else ("width", width)
            raise KitError(f"uvit {what} must be even, not {value}")
        self.checkpointing, self.channels_last = options["checkpointing"], options["channels_last"]
        self.inputs = Inputs("uvit", in_channels, patch_size, context_dim, None, num_classes)
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size, self.width, self.time_scale = patch_size, width, time_scale
        self.grid = variant["grid"]
        self.text_tokens = 0 if context_dim is None else variant["text_tokens"]

        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.context_embed = None if context_dim is None else nn.Linear(context_dim, width)
        self.extras = 1 + (num_classes is not None)  # the tokens of time and label
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.text_tokens + self.grid**2, width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, variant) for _ in range(depth // 2))
        self.mid_block = UViTBlock(width, heads, variant)
        self.out_blocks = nn.ModuleList(
            UViTBlock(width, heads, variant, skip=True) for _ in range(depth // 2)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * self.out_channels)
        conv = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1)
        self.final_layer = conv if variant["conv"] else None
        self._initialise()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """As ViT: matrices from a normal of deviation 0.02 cut at 2; the answer starts at zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zeroed(self.decoder_pred)
        if self.final_layer is not None:
            nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def _positions(self, m: int, h: int, w: int) -> Tensor:
        """Of time and label, m text tokens and h × w patches: (1, n, d)."""
        if m > self.text_tokens:
            raise KitError(f"{m} text tokens: this uvit has positions for {self.text_tokens}")
        cut = self.extras + self.text_tokens
        cells = self.pos_embed[:, cut:]
        if (h, w) != (self.grid, self.grid):
            picture = to_picture(cells, self.grid, self.grid).float()
            picture = F.interpolate(picture, (h, w), mode="bilinear", align_corners=False)
            cells = to_cells(picture).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, : self.extras + m], cells], dim=1)

    def _tokens(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None, int]:
        """All tokens (b, n, d), their mask (b, n), and how many of them stand before the patches."""
        patches = self.patch_embed(x)
        time = timestep_embedding(t * self.time_scale, self.width).to(patches.dtype)
        parts, mask = [time[:, None]], cond.mask if self.context_embed is not None else None
        if self.label_emb is not None and cond.labels is not None:
            parts.insert(0, self.label_emb(cond.labels)[:, None])
        m = 0
        if self.context_embed is not None and cond.tokens is not None:
            m = cond.tokens.shape[1]
            parts.append(self.context_embed(cond.tokens) if cond.memory is None else cond.memory[0])
        if mask is not None:
            before, after = (mask.new_ones(len(x), n) for n in (self.extras, patches.shape[1]))
            mask = torch.cat([before, mask, after], dim=1)
        return torch.cat([*parts, patches], dim=1), mask, m

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text's tokens, projected; the rest is a sequence with the patches."""
        if self.context_embed is None:
            return cond
        self.inputs.check_text(cond)
        return replace(cond, memory=(self.context_embed(cond.tokens),))

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
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        tokens, mask, m = self._tokens(x, t, cond)
        tokens = tokens + self._positions(m, h, w)
        pairs = list(zip(self.in_blocks, reversed(self.out_blocks), strict=True))
        cut = place(len(pairs))
        skips: list[Tensor] = []
        tokens = self._down(pairs[:cut], skips, tokens, mask)
        tokens = inner(partial(self._inside, pairs[cut:]), tokens, (mask,), base=tokens)
        tokens = self._up(pairs[:cut], skips, tokens, mask)
        out = self.decoder_pred(self.norm(tokens)[:, self.extras + m :])
        picture = from_patches(out, h, w, self.patch_size)
        return picture if self.final_layer is None else self.final_layer(picture)

    def _inside(self, pairs: list[Pair], tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (b, n, d) after the pairs and the middle block between them."""
        skips: list[Tensor] = []
        tokens = self._down(pairs, skips, tokens, mask)
        tokens = self._run(self.mid_block, tokens, mask)
        return self._up(pairs, skips, tokens, mask)

    def _down(self, pairs: list[Pair], skips: list[Tensor], tokens: Tensor, mask: Tensor | None) -> Tensor:
        for block, _ in pairs:
            tokens = self._run(block, tokens, mask)
            skips.append(tokens)
        return tokens

    def _up(self, pairs: list[Pair], skips: list[Tensor], tokens: Tensor, mask: Tensor | None) -> Tensor:
        for _, block in reversed(pairs):
            tokens = self._run(block, tokens, mask, skips.pop())
        return tokens

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        return [1 - 2 * k / (2 * len(self.in_blocks) + 1) for k in range(1, len(self.in_blocks) + 1)]

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return block(*inputs)


def _sampling() -> dict[str, Any]:
    """Of the published latent models, which stand on Stable Diffusion's autoencoder and schedule."""
    schedule = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timesteps": 1000}
    guidance = {"name": "cfg", "scale": 1.4}  # written 0.4 in their code
    return {"sampling": {"schedule": schedule, "prediction": "eps", "steps": 50, "guidance": guidance}}


def _size(name: str) -> Callable[[Callable[..., UViT]], Callable[..., UViT]]:
    """Register a size; it takes the options of ``UViT`` that do not define it, and shows exactly those."""

    def add(build: Callable[..., UViT]) -> Callable[..., UViT]:
        signature = inspect.signature(UViT)
        fixed = ("width", "depth", "heads")
        open_options = [p for key, p in signature.parameters.items() if key not in fixed]
        build.__signature__ = signature.replace(parameters=open_options)  # type: ignore[attr-defined]
        build.__annotations__ = {p.name: p.annotation for p in open_options} | {"return": "UViT"}
        return register(name, **_sampling())(build)

    return add


@_size("uvit_s")
def uvit_s(**options) -> UViT:
    """U-ViT-S: 13 blocks of width 512, 44 M parameters."""
    return UViT(width=512, depth=12, heads=8, **options)


@_size("uvit_s_deep")
def uvit_s_deep(**options) -> UViT:
    """U-ViT-S (Deep): 17 blocks of width 512, 58 M parameters."""
    return UViT(width=512, depth=16, heads=8, **options)


@_size("uvit_m")
def uvit_m(**options) -> UViT:
    """U-ViT-M: 17 blocks of width 768, 131 M parameters."""
    return UViT(width=768, depth=16, heads=12, **options)


@_size("uvit_l")
def uvit_l(**options) -> UViT:
    """U-ViT-L: 21 blocks of width 1024, 287 M parameters."""
    return UViT(width=1024, depth=20, heads=16, **options)


@_size("uvit_h")
def uvit_h(**options) -> UViT:
    """U-ViT-H: 29 blocks of width 1152, 501 M parameters."""
    return UViT(width=1152, depth=28, heads=16, **options)

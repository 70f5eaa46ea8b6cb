"""MMDiT, the transformer of Stable Diffusion 3 (Esser et al. 2024) and, with MMDiT-X's changes, of 3.5.

Axes: b batch, c channels, h w picture, n patches, m text tokens, d width, a heads, p patch side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_kit.attention import attention
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.dit import FinalLayer
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.heads import join_heads, split_heads
from imagen_kit.denoisers.layers.inner import run_blocks, shares
from imagen_kit.denoisers.layers.inputs import Inputs
from imagen_kit.denoisers.layers.joint import (
    JointAttention,
    VectorEmbedder,
    check_sizes,
    chosen,
    from_patches,
    initialise,
    joint_mask,
)
from imagen_kit.denoisers.layers.transformer import (
    Mlp,
    PatchEmbed,
    gated,
    modulate,
    sincos_positions,
)
from imagen_kit.errors import KitError

RUNTIME = {"checkpointing": False, "channels_last": False}
DETAILS: dict[str, Any] = {"qk_norm": False, "dual_layers": (), "mlp_ratio": 4.0, "grid": 192}
Runtime = Mapping[str, bool] | None


class Heads(nn.Module):
    """Queries, keys and values of one stream, and the projection of what attention answers.

    Args:
        dim, heads: width and number of heads.
        qk_norm: RMS norms on queries and keys, which keep attention's logits bounded (SD3.5).
        answers: False for the last text stream, whose answer nobody reads.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, answers: bool = True):
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if answers:
            self.proj = nn.Linear(dim, dim)
        self.ln_q = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.ln_k = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, n, d) → q, k, v, each (b, a, n, d/a)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_dim)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v


class PictureAttention(Heads):
    """The patches among themselves: the second attention of MMDiT-X's first blocks."""

    is_self_attention = True  # read by guidance that changes layers

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        return self.proj(join_heads(attention(*self.split(x))))


class Stream(nn.Module):
    """The half of a block that belongs to text or to picture: norms, projections, MLP, modulation.

    Args:
        dim, heads: of the block.
        details: of the network.
        dual: with a second attention, of the patches alone.
        last: the text's half of the last block, of which only keys and values matter.
    """

    def __init__(
        self, dim: int, heads: int, details: Mapping[str, Any], dual: bool = False, last: bool = False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Heads(dim, heads, details["qk_norm"], answers=not last)
        self.attn2 = PictureAttention(dim, heads, details["qk_norm"]) if dual else None
        if not last:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(dim, details["mlp_ratio"])
        self.parts = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.parts * dim))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """(b, d) → shift and scale before attention, gate after it; the same of the MLP and of ``attn2``."""
        return self.adaLN_modulation(c).chunk(self.parts, dim=-1)

    def before(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(b, n, d) → q, k, v, each (b, a, n, d/a)."""
        return self.attn.split(modulate(self.norm1(x), parts[0], parts[1]))

    def after(self, x: Tensor, answer: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The stream (b, n, d) and attention's answer (b, n, d) → (b, n, d)."""
        second = None
        if self.attn2 is not None:  # it reads the same normalised patches as the joint attention
            second = self.attn2(modulate(self.norm1(x), parts[6], parts[7]))
        x = gated(x, parts[2], self.attn.proj(answer))
        if second is not None:
            x = gated(x, parts[8], second)
        return gated(x, parts[5], self.mlp(modulate(self.norm2(x), parts[3], parts[4])))


class JointBlock(nn.Module):
    """Text and picture with weights of their own and one attention over both (Esser et al. 2024, Fig. 2b).

    Takes and answers one sequence, the text in front, so that leaving the block out is the identity.
    """

    is_residual = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, details: Mapping[str, Any], dual: bool, last: bool):
        super().__init__()
        self.last = last
        self.context_block = Stream(dim, heads, details, last=last)
        self.x_block = Stream(dim, heads, details, dual=dual)
        self.attend = JointAttention()

    def forward(self, tokens: Tensor, m: int, c: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (b, m + n, d) with m of text, conditioning (b, d), mask (b, m + n) → (b, m + n, d)."""
        text, x = tokens[:, :m], tokens[:, m:]
        of_text, of_x = self.context_block.modulation(c), self.x_block.modulation(c)
        pairs = zip(self.context_block.before(text, of_text), self.x_block.before(x, of_x), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        answer = self.attend(q, k, v, mask)
        x = self.x_block.after(x, answer[:, m:], of_x)
        if not self.last:
            text = self.context_block.after(text, answer[:, :m], of_text)
        return torch.cat([text, x], dim=1)


@register("mmdit")
class MMDiT(nn.Module):
    """MMDiT: transformer over text and patches in two streams with joint attention; text is required.

    Positions are a table of ``grid``² cells, stored with the weights, whose centre is cropped to the picture.
    Modules are named as in Stability AI's code, whose checkpoints fit as they are.

    Args:
        in_channels: channels of x.
        out_channels: channels of the answer; ``in_channels`` by default.
        patch_size: side of a patch.
        width: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        context_dim: width of text tokens.
        pooled_dim: width of the encoder's pooled vector, None for a network that is not told it.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool, "channels_last": bool}``: recompute activations in the backward
            pass; patchify in channels-last memory.
        details: where SD3 and SD3.5 differ. ``qk_norm``: RMS norms on queries and keys; ``dual_layers``: numbers
            of the blocks with a second attention of the picture alone; ``mlp_ratio``: width of the MLP in widths
            of a token; ``grid``: side of the position table, in patches.

    Raises:
        KitError: a width that heads do not divide, an unknown option; when called, a missing or misshapen
            input, a picture with more patches a side than ``grid``.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
        context_dim: int = 4096,
        pooled_dim: int | None = None,
        time_scale: float = 1.0,
        runtime: Runtime = None,
        details: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        options, variant = (
            chosen("mmdit runtime option", runtime, RUNTIME),
            chosen("mmdit detail", details, DETAILS),
        )
        check_sizes("mmdit", width, heads, patch_size=patch_size, depth=depth, grid=variant["grid"])
        if width % 4:
            raise KitError(f"mmdit width {width} must be a multiple of 4 for its positions")
        dual = set(variant["dual_layers"])
        if not dual <= set(range(depth)):
            raise KitError(f"mmdit dual_layers {sorted(dual)} must lie between 0 and {depth - 1}")
        self.inputs = Inputs("mmdit", in_channels, patch_size, context_dim, pooled_dim)
        self.out_channels = out_channels or in_channels
        self.patch_size, self.grid, self.checkpointing = patch_size, variant["grid"], options["checkpointing"]
        self.channels_last = options["channels_last"]

        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.t_embedder = TimestepEmbedder(width, scale=time_scale)
        self.y_embedder = None if pooled_dim is None else VectorEmbedder(pooled_dim, width)
        self.context_embedder = nn.Linear(context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, variant, i in dual, last=i == depth - 1) for i in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels)
        # Large in the published sizes, so its memory is not touched where the weights are still to come.
        self.register_buffer("pos_embed", torch.empty(1, self.grid**2, width))
        if not self.final_layer.linear.weight.is_meta:
            self._initialise()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """As DiT: everything that ends a residual branch, and the answer, starts at zero."""
        initialise(self)
        self.pos_embed.copy_(sincos_positions(self.grid, self.grid, self.pos_embed.shape[-1]))
        for block in self.joint_blocks:
            for stream in (block.context_block, block.x_block):
                zeroed(stream.adaLN_modulation[1])  # type: ignore[index,union-attr,arg-type]
        zeroed(self.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        zeroed(self.final_layer.linear)

    def _positions(self, h: int, w: int) -> Tensor:
        """The centre of the table, (1, h·w, d)."""
        if max(h, w) > self.grid:
            side = self.grid * self.patch_size
            raise KitError(f"picture of {h}×{w} patches: this mmdit has positions for sides up to {side}")
        top, left = (self.grid - h) // 2, (self.grid - w) // 2
        table = self.pos_embed.unflatten(1, (self.grid, self.grid))
        return table[:, top : top + h, left : left + w].flatten(1, 2)

    def _read(self, cond: Cond) -> tuple[Tensor, ...]:
        """The text's tokens (b, m, d) and, where the network is told it, its vector (b, d)."""
        if cond.memory is not None:
            return cond.memory
        text = self.context_embedder(cond.tokens)
        return (text,) if self.y_embedder is None else (text, self.y_embedder(cond.pooled))

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: the text's tokens and vector, projected; the rest changes with the time."""
        self.inputs.check_text(cond)
        return replace(cond, memory=self._read(replace(cond, memory=None)))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture.
            t: (b,) native times.
            cond: text tokens, their mask (None: all are attended to, as the published models do), pooled text.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        assert cond.tokens is not None
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        positions = self._positions(h, w)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        c = self.t_embedder(t)
        text, *vectors = self._read(cond)
        for vector in vectors:
            c = c + vector
        picture = self.x_embedder(x)
        tokens = torch.cat([text, picture + positions.to(picture.dtype)], dim=1)
        m, mask = cond.tokens.shape[1], joint_mask(cond.mask, h * w)

        def block(i: int, tokens: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
            return self._run(self.joint_blocks[i], tokens, m, c, mask)

        patches = run_blocks(block, len(self.joint_blocks), tokens, (c, mask), start=m)
        return from_patches(self.final_layer(patches, c), h, w, self.patch_size)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return block(*inputs)

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        return shares(len(self.joint_blocks))


def _published(depth: int, grid: int, qk_norm: bool, dual_layers: Sequence[int], **options: Any) -> MMDiT:
    """Stability AI's rule: as many heads of 64 as blocks; latents of 16 channels, T5-XXL's and CLIP's text."""
    return MMDiT(
        *(16, None, 2, 64 * depth, depth, depth, 4096, 2048),
        details={"qk_norm": qk_norm, "dual_layers": list(dual_layers), "grid": grid},
        **options,
    )


def _sampling(steps: int, scale: float, **more: Any) -> dict[str, Any]:
    guidance = {"name": "cfg", "scale": scale}
    schedule = {"name": "flow", "shift": 3.0}
    return {
        "sampling": {"schedule": schedule, "prediction": "flow", "steps": steps, "guidance": guidance, **more}
    }


@register("sd3_medium", **_sampling(28, 7.0, sampler="euler"))
def sd3_medium(time_scale: float = 1.0, runtime: Runtime = None) -> MMDiT:
    """Stable Diffusion 3 medium: 24 blocks of width 1536, 2.0 B parameters."""
    return _published(24, 192, False, (), time_scale=time_scale, runtime=runtime)


@register("sd35_medium", **_sampling(50, 5.0, sampler="dpmpp_2m", skip_layers=[7, 8, 9], skip_scale=2.5))
def sd35_medium(time_scale: float = 1.0, runtime: Runtime = None) -> MMDiT:
    """Stable Diffusion 3.5 medium: 24 blocks of width 1536, 13 of them with dual attention, 2.2 B parameters."""
    return _published(24, 384, True, range(13), time_scale=time_scale, runtime=runtime)


@register("sd35_large", **_sampling(40, 4.5, sampler="dpmpp_2m"))
def sd35_large(time_scale: float = 1.0, runtime: Runtime = None) -> MMDiT:
    """Stable Diffusion 3.5 large: 38 blocks of width 2432, 8.1 B parameters."""
    return _published(38, 192, True, (), time_scale=time_scale, runtime=runtime)

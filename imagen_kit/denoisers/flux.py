"""FLUX.1 (Black Forest Labs 2024): blocks of two streams, then blocks of one, rotary positions, told guidance.

Axes: b batch, c channels, h w picture, n patches, m text tokens, d width, a heads, p patch side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.dit import FinalLayer
from imagen_kit.denoisers.layers.activated import split_gelu
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.heads import split_heads
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
    to_patches,
)
from imagen_kit.denoisers.layers.rope import Rotation, default_widths, picture_places, rotate, rotation
from imagen_kit.denoisers.layers.transformer import Mlp, gated, modulate
from imagen_kit.errors import KitError

RUNTIME = {"checkpointing": False}
DETAILS: dict[str, Any] = {
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "axes": None,
    "theta": 10_000.0,
}
Runtime = Mapping[str, bool] | None


class QKNorm(nn.Module):
    """RMS norms on queries and keys, which keep attention's logits bounded."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = nn.RMSNorm(dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Two of (b, a, n, d/a), normalised over the last axis."""
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """One vector → ``parts`` vectors: shift, scale and gate of each branch, in this order."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(b, d) → ``parts`` of (b, d)."""
        return self.lin(F.silu(c)).chunk(self.parts, dim=-1)


class Heads(nn.Module):
    """Normalised queries and keys, and values, of one stream; the projection of what attention answers."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.norm = QKNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, n, d) → q, k, v, each (b, a, n, d/a)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_dim)
        return (*self.norm(q, k), v)


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class DoubleBlock(nn.Module):
    """Text and picture with weights of their own and one attention over both, as in MMDiT.

    Takes and answers one sequence, the text in front, so that leaving the block out is the identity.
    """

    is_residual = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, details: Mapping[str, Any]):
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(dim, 6))
            self.add_module(f"{stream}_norm1", _norm(dim))
            self.add_module(f"{stream}_attn", Heads(dim, heads, details["qkv_bias"]))
            self.add_module(f"{stream}_norm2", _norm(dim))
            self.add_module(f"{stream}_mlp", Mlp(dim, details["mlp_ratio"]))
        self.attend = JointAttention()

    def _before(self, stream: str, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stream (b, n, d) → q, k, v, each (b, a, n, d/a)."""
        norm, attn = getattr(self, f"{stream}_norm1"), getattr(self, f"{stream}_attn")
        return attn.split(modulate(norm(x), parts[0], parts[1]))

    def _after(self, stream: str, x: Tensor, answer: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Stream and attention's answer, both (b, n, d) → (b, n, d)."""
        norm, mlp = getattr(self, f"{stream}_norm2"), getattr(self, f"{stream}_mlp")
        x = gated(x, parts[2], getattr(self, f"{stream}_attn").proj(answer))
        return gated(x, parts[5], mlp(modulate(norm(x), parts[3], parts[4])))

    def forward(self, tokens: Tensor, m: int, c: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """Tokens (b, m + n, d) with m of text, conditioning (b, d), mask (b, m + n) → (b, m + n, d)."""
        text, x = tokens[:, :m], tokens[:, m:]
        of_text, of_x = self.txt_mod(c), self.img_mod(c)  # type: ignore[operator]
        pairs = zip(self._before("txt", text, of_text), self._before("img", x, of_x), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        answer = self.attend(rotate(q, turn), rotate(k, turn), v, mask)
        text = self._after("txt", text, answer[:, :m], of_text)
        return torch.cat([text, self._after("img", x, answer[:, m:], of_x)], dim=1)


class SingleBlock(nn.Module):
    """One stream whose attention and MLP stand side by side, between two layers that they share."""

    is_residual = True  # read by guidance that changes layers

    def __init__(self, dim: int, heads: int, details: Mapping[str, Any]):
        super().__init__()
        hidden = int(dim * details["mlp_ratio"])
        self.head_dim, self.attended = dim // heads, 3 * dim
        self.modulation = Modulation(dim, 3)
        self.pre_norm = _norm(dim)
        self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        self.norm = QKNorm(self.head_dim)
        self.attend = JointAttention()
        self.linear2 = nn.Linear(dim + hidden, dim)

    def forward(self, tokens: Tensor, c: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """Tokens (b, m + n, d), conditioning (b, d), mask (b, m + n) → (b, m + n, d)."""
        shift, scale, gate = self.modulation(c)
        cells = modulate(self.pre_norm(tokens), shift, scale)
        qkv, hidden = split_gelu(self.linear1, cells, self.attended, "tanh")
        q, k, v = split_heads(qkv, 3, self.head_dim)
        q, k = self.norm(q, k)
        answer = self.attend(rotate(q, turn), rotate(k, turn), v, mask)
        out = self.linear2(torch.cat([answer, hidden], dim=-1))
        return gated(tokens, gate, out)


@register("flux")
class Flux(nn.Module):
    """FLUX: transformer over text and patches, of two streams and then of one; text is required.

    Positions are rotations by row and column, so any sides that the patch divides will do. Modules are named as
    in Black Forest Labs' code.

    Args:
        in_channels: channels of x, which is packed into patches inside.
        out_channels: channels of the answer; ``in_channels`` by default.
        width: width of a token.
        depth: number of blocks of two streams.
        single_depth: number of blocks of one stream that follow.
        heads: attention heads of a block.
        context_dim: width of text tokens.
        pooled_dim: width of the encoder's pooled vector, None for a network that is not told it.
        guidance: whether it is told a guidance scale (``cond.guidance``) that it was distilled to obey.
        time_scale: factor on native time inside the time embedding (see ``Schedule.time_scale``).
        runtime: ``{"checkpointing": bool}``: recompute activations in the backward pass.
        details: ``patch_size``; ``mlp_ratio``: width of the MLP in widths of a token; ``qkv_bias``; ``axes``:
            how many numbers of a head are turned by the first axis, row and column (FLUX.1: 16, 56, 56 of 128);
            ``theta``: of the rotations.

    Raises:
        KitError: a width that heads do not divide, axes that do not make up a head, an unknown option; when
            called, a missing or misshapen input.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 384,
        depth: int = 3,
        single_depth: int = 6,
        heads: int = 6,
        context_dim: int = 4096,
        pooled_dim: int | None = None,
        guidance: bool = False,
        time_scale: float = 1.0,
        runtime: Runtime = None,
        details: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.checkpointing = chosen("flux runtime option", runtime, RUNTIME)["checkpointing"]
        variant = chosen("flux detail", details, DETAILS)
        patch = self.patch_size = variant["patch_size"]
        check_sizes("flux", width, heads, depth=depth, patch_size=patch)
        if single_depth < 0:
            raise KitError(f"flux single_depth must be at least 0, not {single_depth}")
        self.axes = list(variant["axes"] or default_widths(width // heads))
        if len(self.axes) != 3 or sum(self.axes) != width // heads or any(n % 2 for n in self.axes):
            raise KitError(
                f"flux axes {self.axes} must be three even numbers that make up a head ({width // heads})"
            )
        self.theta = float(variant["theta"])
        self.inputs = Inputs("flux", in_channels, patch, context_dim, pooled_dim)
        self.out_channels = out_channels or in_channels

        self.img_in = nn.Linear(in_channels * patch**2, width)
        self.txt_in = nn.Linear(context_dim, width)
        self.time_in = TimestepEmbedder(width, scale=time_scale)
        self.vector_in = None if pooled_dim is None else VectorEmbedder(pooled_dim, width)
        self.guidance_in = TimestepEmbedder(width, scale=1000.0) if guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads, variant) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads, variant) for _ in range(single_depth))
        self.final_layer = FinalLayer(width, patch**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT: everything that ends a residual branch, and the answer, starts at zero."""
        initialise(self)
        for module in self.modules():
            if isinstance(module, Modulation):
                zeroed(module.lin)
        zeroed(self.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        zeroed(self.final_layer.linear)

    def _read(self, cond: Cond) -> tuple[Tensor, ...]:
        """The text's tokens (b, m, d) and the vectors (b, d) of guidance scale and pooled text."""
        if cond.memory is not None:
            return cond.memory
        vectors = []
        if self.guidance_in is not None:
            if cond.guidance is None:
                raise KitError("this flux is told a guidance scale: give it one a picture in cond.guidance")
            vectors.append(self.guidance_in(cond.guidance))
        if self.vector_in is not None:
            vectors.append(self.vector_in(cond.pooled))
        return (self.txt_in(cond.tokens), *vectors)

    def prepare(self, cond: Cond) -> Cond:
        """``cond`` with a memory: text and guidance scale, projected; the rest changes with the time."""
        self.inputs.check_text(cond)
        return replace(cond, memory=self._read(replace(cond, memory=None)))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's raw answer.

        Args:
            x: (b, in_channels, h, w) noisy picture.
            t: (b,) native times.
            cond: text tokens, their mask (None: all are attended to, as the published models do), pooled text,
                guidance.

        Returns:
            (b, out_channels, h, w).
        """
        cond = cond or Cond()
        self.inputs.check(x, t, cond)
        assert cond.tokens is not None
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        text, *vectors = self._read(cond)
        c = self.time_in(t)
        for vector in vectors:
            c = c + vector
        tokens = torch.cat([text, self.img_in(to_patches(x, self.patch_size))], dim=1)
        m, mask = cond.tokens.shape[1], joint_mask(cond.mask, h * w)
        turn = rotation(picture_places(m, h, w, x.device), self.axes, self.theta)
        pairs = len(self.double_blocks)

        def block(i: int, tokens: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
            if i < pairs:
                return self._run(self.double_blocks[i], tokens, m, c, turn, mask)
            return self._run(self.single_blocks[i - pairs], tokens, c, turn, mask)

        patches = run_blocks(block, pairs + len(self.single_blocks), tokens, (c, mask), start=m)
        return from_patches(self.final_layer(patches, c), h, w, self.patch_size, channels_first=True)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[return-value]
        return block(*inputs)

    @property
    def shares(self) -> list[float]:
        """By place, the share of blocks that lies inside it; see ``layers.inner``."""
        return shares(len(self.double_blocks) + len(self.single_blocks))


def _published(guidance: bool, **options: Any) -> Flux:
    return Flux(16, None, 3072, 19, 38, 24, 4096, 768, guidance, **options)


def _sampling(shift: float, steps: int, **more: Any) -> dict[str, Any]:
    schedule = {"name": "flow", "shift": shift}
    return {
        "sampling": {"schedule": schedule, "prediction": "flow", "sampler": "euler", "steps": steps, **more}
    }


# e^1.15: its shift grows with the number of patches and is this at 1024²
@register("flux_dev", **_sampling(3.1582, 50, told_guidance=3.5, tokens=512))
def flux_dev(time_scale: float = 1.0, runtime: Runtime = None) -> Flux:
    """FLUX.1-dev: 19 blocks of two streams and 38 of one, width 3072, 11.9 B parameters, told its guidance."""
    return _published(True, time_scale=time_scale, runtime=runtime)


@register("flux_schnell", **_sampling(1.0, 4, tokens=256))
def flux_schnell(time_scale: float = 1.0, runtime: Runtime = None) -> Flux:
    """FLUX.1-schnell: the same network without guidance, distilled to 1 to 4 steps, 11.9 B parameters."""
    return _published(False, time_scale=time_scale, runtime=runtime)

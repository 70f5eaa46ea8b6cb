"""The spatial transformer of latent diffusion (Rombach et al. 2022, appendix E.2.1): Stable Diffusion's attention.

Axes: b batch, c channels, h w picture, m cells, n text tokens, d width.
"""

from __future__ import annotations

from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.activated import gated_gelu
from imagen_kit.denoisers.layers.blocks import zeroed
from imagen_kit.denoisers.layers.context import Context, TextReader, number, share
from imagen_kit.denoisers.layers.heads import join_heads, split_heads, to_cells, to_picture


class HeadedAttention(TextReader):
    """Multi-head attention with separate projections, biases on the last alone."""

    is_self_attention: bool = False  # read by guidance that changes layers

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, context_dim) → two of (b, a, n, d/a)."""
        k, v = (split_heads(part, 1, self.head_dim)[0] for part in (self.to_k(text), self.to_v(text)))
        return k, v

    def forward(self, x: Tensor, context: Context, mask: Tensor | None = None) -> Tensor:
        """Queries (b, m, d), keys (b, n, context_dim) or keys and values, mask (b, n) bool → (b, m, d)."""
        (q,) = split_heads(self.to_q(x), 1, self.head_dim)
        assert context is not None
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.to_out(join_heads(attention(q, k, v, mask)))


class GatedMlp(nn.Module):
    """x·gelu(g) between two linear layers (GEGLU: Shazeer 2020), GELU exact."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * expansion * dim)
        self.out = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., d)."""
        return self.out(gated_gelu(self.proj, x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, MLP, each behind a layer norm and with a residual path.

    Args:
        dim: width of the cells.
        context_dim: width of text tokens.
        heads: of both attentions.
        cells: whether the first attention is among the cells; False makes it a second one to the text.
    """

    is_residual = True  # these marks are read by guidance that changes layers

    def __init__(self, dim: int, context_dim: int, heads: int, cells: bool = True):
        super().__init__()
        self.cells = cells
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = HeadedAttention(dim, dim if cells else context_dim, heads)
        self.attn1.is_self_attention, self.attn1.reads_text = cells, not cells
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = HeadedAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GatedMlp(dim)

    def forward(self, x: Tensor, context: Context, mask: Tensor | None) -> Tensor:
        """Cells (b, m, d), text (b, n, context_dim) or its keys and values, mask (b, n) bool → (b, m, d)."""
        first = last = context
        if isinstance(context, tuple):  # of attn1, where it reads text, then of attn2
            first, last = context[:2], context[-2:]
        normed = self.norm1(x)
        x = x + (self.attn1(normed, normed) if self.cells else self.attn1(normed, first, mask))
        x = x + self.attn2(self.norm2(x), last, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a picture, between two projections and with a residual path.

    The projections are linear; Stable Diffusion 1.x stores them as convolutions of side 1, which compute the same.

    Args:
        channels: width.
        context_dim: width of text tokens.
        heads: attention heads; divide ``channels``.
        depth: transformer blocks.
        norm: GroupNorm of the picture (epsilon 1e-6 in all published models).
        cells: see ``TransformerBlock``.
    """

    is_residual = True

    def __init__(
        self, channels: int, context_dim: int, heads: int, depth: int, norm: nn.GroupNorm, cells: bool = True
    ):
        super().__init__()
        self.norm = norm
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads, cells) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Linear(channels, channels))
        number(self.transformer_blocks)

    def forward(self, x: Tensor, context: Context, mask: Tensor | None = None) -> Tensor:
        """(b, c, h, w), text (b, n, context_dim) or its keys and values, mask (b, n) bool → (b, c, h, w)."""
        cells = self.proj_in(to_cells(self.norm(x)).contiguous())  # else the bias takes a pass of its own
        for block in self.transformer_blocks:
            cells = block(cells, share(context, block), mask)
        return x + to_picture(self.proj_out(cells), *x.shape[-2:])

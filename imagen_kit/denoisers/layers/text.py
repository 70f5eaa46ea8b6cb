"""How frozen text features enter a denoiser: a small trained adapter and attention pooling.

Axes: b batch, n tokens, d width, p width of the pooled vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagen_kit.attention import attention
from imagen_kit.denoisers.layers.heads import join_heads, split_heads
from imagen_kit.errors import KitError


class TextLayer(nn.Module):
    """Pre-norm transformer layer over text tokens; masked tokens are never attended to."""

    def __init__(self, dim: int, head_dim: int = 32, expansion: int = 2):
        super().__init__()
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        last = nn.Linear(expansion * dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), last)
        for layer in (self.out, last):  # starts as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, n, d), (b, n) bool → (b, n, d)."""
        q, k, v = split_heads(self.qkv(self.norm1(x)), 3, self.head_dim)
        x = x + self.out(join_heads(attention(q, k, v, mask)))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """One vector from the tokens: learned queries attend to them (Imagen §2.3, with layer norms)."""

    def __init__(self, dim: int, out: int, queries: int = 4, head_dim: int = 32):
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Sequential(nn.LayerNorm(queries * dim), nn.Linear(queries * dim, out))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, n, d), (b, n) bool → (b, out)."""
        k, v = split_heads(self.kv(self.norm(x)), 2, self.head_dim)
        (q,) = split_heads(self.query[None], 1, self.head_dim)
        q = q.expand(len(x), -1, -1, -1).to(k.dtype)
        return self.out(join_heads(attention(q, k, v, mask)).flatten(1))


class TextAdapter(nn.Module):
    """Frozen text features → tokens for cross-attention and a vector for the time embedding.

    Args:
        context_dim: width of the encoder's tokens.
        dim: width of the adapted tokens.
        embed_dim: width of the time embedding.
        pooled_dim: width of the encoder's own pooled vector, or None.
        depth: transformer layers over the tokens.
        head_dim: width of their heads; divides ``dim``.

    Raises:
        KitError: ``head_dim`` does not divide ``dim``.
    """

    def __init__(
        self,
        context_dim: int,
        dim: int,
        embed_dim: int,
        pooled_dim: int | None = None,
        depth: int = 0,
        head_dim: int = 32,
    ):
        super().__init__()
        if dim % head_dim:
            raise KitError(f"text adapter of width {dim}: head_dim {head_dim} must divide it")
        self.norm = nn.LayerNorm(context_dim)  # "helps considerably" (Imagen §2.3)
        self.project = nn.Linear(context_dim, dim)
        self.layers = nn.ModuleList(TextLayer(dim, head_dim) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.pool = AttentionPool(dim, embed_dim, head_dim=head_dim)
        self.pooled = None if pooled_dim is None else nn.Linear(pooled_dim, embed_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, Tensor]:
        """(b, n, context_dim), (b, n) bool, (b, pooled_dim) → (b, n, dim), (b, embed_dim)."""
        x = self.project(self.norm(tokens))
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm_out(x)
        vector = self.pool(x, mask)
        if self.pooled is not None and pooled is not None:
            vector = vector + self.pooled(pooled)
        return x, vector


class QueryPool(nn.Module):
    """Attention whose query is the tokens' mean plus a learned vector, over mean and tokens (DeepFloyd IF)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, d)."""
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([mean, x], dim=1)
        projected = (self.q_proj(mean), self.k_proj(x), self.v_proj(x))
        q, k, v = (split_heads(part, 1, self.head_dim)[0] for part in projected)
        return join_heads(attention(q, k, v)).flatten(1)


class TextPool(nn.Module):
    """Text tokens → a vector for the time embedding, with norms before and after (DeepFloyd IF).

    All tokens count alike, padding too: IF was trained on 77 tokens without a mask.

    Args:
        context_dim: width of the tokens.
        embed_dim: width of the vector.
        heads: of the pooling; divide ``context_dim``.

    Raises:
        KitError: ``heads`` does not divide ``context_dim``.
    """

    def __init__(self, context_dim: int, embed_dim: int, heads: int):
        super().__init__()
        if context_dim % heads:
            raise KitError(f"text pooling of width {context_dim}: {heads} heads must divide it")
        self.norm1 = nn.LayerNorm(context_dim)
        self.pool = QueryPool(context_dim, heads)
        self.proj = nn.Linear(context_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, context_dim) → (b, embed_dim)."""
        return self.norm2(self.proj(self.pool(self.norm1(tokens))))

"""What a network is told besides the picture, as one vector and as tokens for its attention.

Axes: b batch, n text tokens, d width, e embedding width.
"""

from __future__ import annotations

from torch import Tensor, nn

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.context import Context, remember
from imagen_kit.denoisers.layers.embeddings import TimestepEmbedder
from imagen_kit.denoisers.layers.text import TextAdapter


class Told(nn.Module):
    """Time, text, class label and the low-resolution picture's noise level → their summed embedding, text tokens.

    Imagen §2.3: the time embedding, plus the attention-pooled text, plus (for super-resolution) the level of the
    noise in the low-resolution picture. Which parts there are is checked by ``Inputs``, not here.

    Args:
        dim: e.
        text_dim: width of the adapted tokens.
        context_dim: width of text tokens; None for a network without text.
        pooled_dim: width of the encoder's pooled vector, None where it has none.
        text_depth: trained transformer layers between the frozen text features and the attention.
        num_classes: class labels 0 … num_classes - 1, ``num_classes`` meaning none; None without labels.
        low_res_noised: whether there is a noise level.
        time_scale: factor on native time.
        head_dim: of the heads that pool the text; divides ``text_dim``.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        text_depth: int = 0,
        num_classes: int | None = None,
        low_res_noised: bool = False,
        time_scale: float = 1.0,
        head_dim: int = 32,
    ):
        super().__init__()
        self.time = TimestepEmbedder(dim, scale=time_scale)
        self.text = None
        if context_dim is not None:
            self.text = TextAdapter(context_dim, text_dim, dim, pooled_dim, text_depth, head_dim)
        self.labels = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        self.low_res_level = TimestepEmbedder(dim, scale=1000.0) if low_res_noised else None

    def prepare(self, network: nn.Module, cond: Cond) -> Cond:
        """``cond`` with a memory for the network: the text adapted and pooled, and all keys and values of it."""
        if self.text is None:
            return cond
        text, vector = self.text(cond.tokens, cond.mask, cond.pooled)
        return remember(network, cond, text, vector)

    def forward(self, t: Tensor, cond: Cond) -> tuple[Tensor, Context]:
        """Native times (b,) → embedding (b, e), not yet activated; text (b, n, text_dim), None without text.

        Where ``cond`` has a memory, that takes the place of the text.
        """
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
        return emb, context

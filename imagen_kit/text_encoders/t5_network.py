"""The encoder of the T5 family: pre-norm blocks of self-attention and feed-forward, relative positions as a bias.

Raffel et al. 2020 (arXiv:1910.10683), §2.1; v1.1, mT5, umT5 and ByT5 gate the feed-forward layer (Shazeer 2020,
arXiv:2002.05202); umT5 has a table of relative positions in every block (Chung et al. 2023, arXiv:2304.09151).

Axes: b prompts, n tokens, d width, h heads. Modules are named as the tensors of published files are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.errors import KitError, nearest, unknown

KINDS = ("t5", "mt5", "umt5")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class T5Settings:
    """The numbers of a config.json that an encoder is made of, under their names there."""

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 8
    num_layers: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        if self.model_type not in KINDS:
            raise KitError(unknown("t5 model_type", self.model_type, KINDS))
        if self.activation not in ACTIVATIONS:
            raise KitError(unknown("t5 feed_forward_proj", self.activation, ACTIVATIONS))

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if name == "gelu" and self.gated else name  # what published configs mean by it

    @classmethod
    def of(cls, config: Mapping[str, Any], strict: bool = False) -> T5Settings:
        """From the fields of a config.json.

        Args:
            config: its fields; those of mT5 and umT5 have defaults of their own.
            strict: KitError for a field that makes no difference to an encoder.
        """
        known = [field.name for field in fields(cls)]
        for key in config if strict else ():
            if key not in known:
                guess = nearest(key, known)
                raise KitError(
                    f"t5 size has no field {key!r}" + (f"; did you mean {guess!r}?" if guess else "")
                )
        defaults: dict[str, Any] = {}
        if config.get("model_type") in ("mt5", "umt5"):
            defaults = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
            defaults["feed_forward_proj"] = "gated-gelu"
        return cls(**{**defaults, **{key: config[key] for key in known if key in config}})


class T5Norm(nn.Module):
    """x / rms(x) · weight, the mean square taken in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class T5SelfAttention(nn.Module):
    """softmax(q kᵀ + bias) v, without the usual factor 1/√d, which the initial values account for."""

    def __init__(self, settings: T5Settings, positions: bool):
        super().__init__()
        inner = settings.num_heads * settings.d_kv
        self.heads = settings.num_heads
        self.buckets = settings.relative_attention_num_buckets
        self.farthest = settings.relative_attention_max_distance
        self.q = nn.Linear(settings.d_model, inner, bias=False)
        self.k = nn.Linear(settings.d_model, inner, bias=False)
        self.v = nn.Linear(settings.d_model, inner, bias=False)
        self.o = nn.Linear(inner, settings.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(self.buckets, self.heads) if positions else None

    def bias(self, n: int, mask: Tensor | None) -> Tensor:
        """(b or 1, h, n, n) what is added to the logits: the value of each distance, and the mask (b, n)."""
        table = self.relative_attention_bias
        assert table is not None
        buckets = relative_buckets(n, self.buckets, self.farthest, table.weight.device)
        bias = table(buckets).permute(2, 0, 1)[None]
        if mask is None:
            return bias
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(-2))


class T5FeedForward(nn.Module):
    """wo(act(wi x)), or gated: wo(act(wi_0 x) · wi_1 x)."""

    wi: Any
    wi_0: Any
    wi_1: Any

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.gated, self.act = settings.gated, ACTIVATIONS[settings.activation]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(settings.d_model, settings.d_ff, bias=False))
        self.wo = nn.Linear(settings.d_ff, settings.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x)))


class T5AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, settings: T5Settings, positions: bool):
        super().__init__()
        self.SelfAttention = T5SelfAttention(settings, positions)
        self.layer_norm = T5Norm(settings.d_model, settings.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.DenseReluDense = T5FeedForward(settings)
        self.layer_norm = T5Norm(settings.d_model, settings.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """``block(x, mask, bias) -> (x, bias)``: the bias is handed on to blocks without a table of their own."""

    def __init__(self, settings: T5Settings, positions: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5AttentionLayer(settings, positions), T5FeedForwardLayer(settings)])

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        own: Any = attention.SelfAttention
        if own.relative_attention_bias is not None:
            bias = own.bias(x.shape[1], mask)
        assert bias is not None
        return feed_forward(attention(x, bias)), bias


class T5Stack(nn.Module):
    """The blocks and the last norm."""

    block: Any  # a module list, or what stands for one

    def __init__(self, settings: T5Settings):
        super().__init__()
        every = settings.model_type == "umt5"
        self.block = nn.ModuleList(T5Block(settings, every or i == 0) for i in range(settings.num_layers))
        self.final_layer_norm = T5Norm(settings.d_model, settings.layer_norm_epsilon)


class T5Network(nn.Module):
    """``network(ids (b, n), mask (b, n) bool or None) -> (b, n, d)``: a T5 encoder.

    Args:
        settings: its sizes.
    """

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.settings = settings
        self.shared = nn.Embedding(settings.vocab_size, settings.d_model)
        self.encoder = T5Stack(settings)

    def forward(self, ids: Tensor, mask: Tensor | None = None, block: int | None = None) -> Tensor:
        """The normed output of ``block``, counted from 1; by default the last.

        Args:
            ids: (b, n) int64.
            mask: (b, n) bool, True = a token that is attended to.
            block: blocks after it are not run.
        """
        depth = len(self.encoder.block) if block is None else block
        for x in self._outputs(ids, mask, depth):
            last = x  # the others may go
        return self.encoder.final_layer_norm(last)

    def outputs(self, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Embeddings and the output of every block, the last one normed: num_layers + 1 of (b, n, d)."""
        found = list(self._outputs(ids, mask, len(self.encoder.block)))
        return [*found[:-1], self.encoder.final_layer_norm(found[-1])]

    def _outputs(self, ids: Tensor, mask: Tensor | None, depth: int) -> Iterator[Tensor]:
        x, bias = self.shared(ids), None
        yield x
        for i in range(depth):
            x, bias = self.encoder.block[i](x, mask, bias)
            yield x


def relative_buckets(n: int, buckets: int, farthest: int, device: torch.device) -> Tensor:
    """(n, n) int64: which entry of the table the distance from query to key has.

    Half of the entries are for keys behind, half for those ahead; of each half, half for single distances and
    half for ranges that grow geometrically up to ``farthest`` (Raffel et al., §2.1).
    """
    place = torch.arange(n, device=device)
    distance = place[None, :] - place[:, None]
    half = buckets // 2
    single = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / single) / math.log(farthest / single)
    ranged = (single + (growth * (half - single)).to(torch.long)).clamp(max=half - 1)
    return torch.where(size < single, size, ranged) + (distance > 0) * half

"""The text path against torch's own transformer layer and against attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagen_kit.denoisers.layers.text import AttentionPool, TextAdapter, TextLayer

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


@pytest.mark.parity
def test_text_layer_is_a_pre_norm_transformer_layer():
    torch.manual_seed(0)
    layer = TextLayer(64, head_dim=32)
    oracle = nn.TransformerEncoderLayer(64, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
    }
    state = {}
    for key in oracle.state_dict():
        stem = next((s for s in names if key.startswith(s)), "")
        state[key] = layer.state_dict()[names.get(stem, "") + key.removeprefix(stem)]
    oracle.load_state_dict(state)
    x = torch.randn(2, 5, 64)
    want = oracle(x, src_key_padding_mask=~MASK)
    # rounding of float32 sums of 128 terms
    torch.testing.assert_close(layer(x, MASK)[MASK], want[MASK], atol=1e-5, rtol=1e-5)


def test_attention_pool_is_attention_by_its_queries():
    torch.manual_seed(0)
    pool = AttentionPool(64, 8, queries=3, head_dim=32)
    x = torch.randn(2, 5, 64)
    k, v = pool.kv(pool.norm(x)).split(64, dim=-1)
    rows = []
    for b in range(2):
        heads = []
        for a in (slice(0, 32), slice(32, 64)):
            logits = pool.query[:, a] @ k[b, MASK[b], a].T / 32**0.5
            heads.append(logits.softmax(-1) @ v[b, MASK[b], a])
        rows.append(torch.cat(heads, -1).flatten())
    torch.testing.assert_close(pool(x, MASK), pool.out(torch.stack(rows)), atol=1e-5, rtol=1e-5)


def test_the_scale_of_frozen_features_does_not_matter():
    """The first layer norm: encoders differ in scale by orders of magnitude."""
    torch.manual_seed(0)
    adapter = TextAdapter(12, 64, 16)
    tokens = torch.randn(2, 5, 12)
    for got, want in zip(adapter(1000 * tokens, MASK, None), adapter(tokens, MASK, None), strict=True):
        # the norm's epsilon, 1e-5 beside a variance of about 1
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_the_encoders_pooled_vector_is_added():
    torch.manual_seed(0)
    adapter = TextAdapter(12, 64, 16, pooled_dim=6, depth=1)
    tokens, pooled = torch.randn(2, 5, 12), torch.randn(2, 6)
    _, without = adapter(tokens, MASK, None)
    _, with_pooled = adapter(tokens, MASK, pooled)
    torch.testing.assert_close(with_pooled - without, adapter.pooled(pooled), atol=1e-5, rtol=0)

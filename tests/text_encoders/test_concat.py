"""Concatenation: what lies where, with encoders of different widths and lengths."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import text_encoders
from imagen_kit.errors import KitError

T5 = {"name": "t5", "size": "tiny", "max_length": 40}
NARROW = {
    "name": "clip",
    "size": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
}
PROMPTS = ["a red star on a white background", "ring", ""]
# Sums run in another order when a batch is padded or split: some float32 rounding of values of order 1.
ROUNDING = 5e-6


def build(entry):
    return text_encoders.create(entry["name"], **{k: v for k, v in entry.items() if k != "name"})


@pytest.fixture(scope="module")
def parts():
    return [build(T5)(PROMPTS), build(NARROW)(PROMPTS)]


def test_channels_lie_side_by_side(parts):
    encoder = text_encoders.create("concat", encoders=[T5, NARROW])
    out = encoder(PROMPTS)
    t5, clip = parts
    n = max(t5.tokens.shape[1], clip.tokens.shape[1])
    assert out.tokens.shape == (3, n, 80)
    assert (encoder.dim, encoder.pooled_dim, encoder.max_length) == (80, 16, 77)
    torch.testing.assert_close(out.tokens[:, : t5.tokens.shape[1], :64], t5.tokens, atol=0, rtol=0)
    torch.testing.assert_close(out.tokens[:, : clip.tokens.shape[1], 64:], clip.tokens, atol=0, rtol=0)
    assert (out.tokens[:, clip.tokens.shape[1] :, 64:] == 0).all()
    longer = torch.maximum(t5.mask.sum(1), clip.mask.sum(1))
    assert torch.equal(out.mask.sum(1), longer)  # real where either has a token
    assert torch.equal(out.pooled, clip.pooled)


def test_tokens_follow_each_other_without_gaps(parts):
    encoder = text_encoders.create("concat", encoders=[NARROW, T5], along="tokens")
    out = encoder(PROMPTS)
    t5, clip = parts
    assert (encoder.dim, encoder.max_length) == (64, 117)
    for i in range(3):
        first, second = clip.tokens[i, clip.mask[i]], t5.tokens[i, t5.mask[i]]
        row = out.tokens[i, out.mask[i]]
        assert len(row) == len(first) + len(second)
        assert torch.equal(row[: len(first), :16], first)
        assert (row[: len(first), 16:] == 0).all()
        assert torch.equal(row[len(first) :], second)
        assert (out.tokens[i, len(row) :] == 0).all()


@pytest.mark.parametrize("along", ["channels", "tokens"])
def test_mixed_batches_equal_single_prompts(along):
    encoder = text_encoders.create(
        "concat", encoders=[{**T5, "cache": 0}, {**NARROW, "cache": 0}], along=along
    )
    batch = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        torch.testing.assert_close(batch.tokens[i, batch.mask[i]], alone.tokens[0], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(batch.pooled[i], alone.pooled[0], atol=ROUNDING, rtol=0)


def test_one_for_tokens_another_for_the_pooled_vector(parts):
    """FLUX: tokens from T5, the pooled vector from CLIP."""
    encoder = text_encoders.create("concat", encoders=[{**T5, "use": "tokens"}, {**NARROW, "use": "pooled"}])
    out = encoder(PROMPTS)
    assert (encoder.dim, encoder.pooled_dim, encoder.max_length) == (64, 16, 40)
    assert torch.equal(out.tokens, parts[0].tokens)
    assert torch.equal(out.pooled, parts[1].pooled)


def test_nesting_as_sd3_does():
    """Two CLIPs side by side, widened to T5's width, then T5; pooled vectors of both CLIPs."""
    padded = {**NARROW, "padding": "attended"}
    pair = {"name": "concat", "encoders": [padded, {**padded, "seed": 1}]}
    encoder = text_encoders.create("concat", encoders=[pair, {**T5, "padding": "attended"}], along="tokens")
    out = encoder(PROMPTS)
    assert out.tokens.shape == (3, 77 + 40, 64)
    assert out.mask.all()
    assert out.pooled.shape == (3, 32)
    assert (out.tokens[:, :77, 32:] == 0).all()
    assert torch.equal(out.tokens[:, :77, :16], build(padded)(PROMPTS).tokens)


def test_built_encoders_and_fp16_of_a_part():
    t5, clip = build(T5), build(NARROW)
    encoder = text_encoders.create("concat", encoders=[t5, clip])
    assert encoder.parts[0] is t5
    with pytest.raises(KitError, match="'t5' overflows in fp16"):
        encoder.half()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": []}, "needs a list of encoders"),
        ({"encoders": "t5"}, "needs a list of encoders"),
        ({"encoders": [{"size": "tiny"}]}, "entry 0 has no 'name'"),
        (
            {"encoders": [T5, {"name": "clipp"}]},
            r"entry 1: unknown text encoder 'clipp'; did you mean 'clip'\?",
        ),
        (
            {"encoders": [{**T5, "sise": 3}]},
            r"entry 0: text encoder 't5' has no option 'sise'; did you mean 'size'\?",
        ),
        ({"encoders": [T5], "along": "token"}, r"unknown direction 'token'; did you mean 'tokens'\?"),
        ({"encoders": [{**T5, "use": "pool"}]}, r"entry 0: unknown use 'pool'; did you mean 'pooled'\?"),
        ({"encoders": [{**T5, "use": "pooled"}]}, r"entry 0 \(t5\) has no pooled vector"),
        ({"encoders": [{**NARROW, "use": "pooled"}]}, "at least one must give tokens"),
    ],
)
def test_bad_lists_are_one_plain_line(options, message):
    with pytest.raises(KitError, match=message) as caught:
        text_encoders.create("concat", **options)
    assert "\n" not in str(caught.value)

"""Tokenizers against independent ones."""

from __future__ import annotations

import pytest

from imagen_kit.errors import KitError
from imagen_kit.text_encoders.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    PreparedTokenizer,
    PretrainedTokenizer,
)

PROMPTS = ["a red star", "灰色背景上，一个大红色星形", "", "naïve 🙂 text\n with  spaces", "x" * 60]


@pytest.mark.parity
@pytest.mark.parametrize("length", [8, 64])
def test_bytes_equal_transformers_byt5(length):
    from transformers import ByT5Tokenizer

    expected = PretrainedTokenizer(ByT5Tokenizer())(PROMPTS, length)
    assert ByteTokenizer()(PROMPTS, length) == expected


def test_half_a_surrogate_pair_is_a_question_mark():
    from transformers import ByT5Tokenizer

    assert PretrainedTokenizer(ByT5Tokenizer())(["a\udcff"], 8) == ByteTokenizer()(["a\udcff"], 8)


def test_bytes_of_broken_text_and_folding():
    assert ByteTokenizer()(["\ud800"], 8) == [[ord("?") + 3, 1]]  # a lone surrogate has no UTF-8
    small = ByteTokenizer(40)(["~z"], 8)[0]
    assert small == [3 + ord("~") % 37, 3 + ord("z") % 37, 1]
    with pytest.raises(KitError, match="more than 3 entries, not 3"):
        ByteTokenizer(3)


@pytest.mark.parity
@pytest.mark.parametrize("length", [8, 77])
def test_bpe_equals_open_clip(length):
    import open_clip

    prompts = ["A photo of a Red  star", "", "ring &amp; cross", "long " * 100]
    rows = open_clip.tokenize(prompts, context_length=length)
    got = BpeTokenizer()(prompts, length)
    for row, ids in zip(rows.tolist(), got, strict=True):
        assert ids + [0] * (length - len(ids)) == row


def test_bpe_folds_into_a_small_vocabulary():
    tokens = BpeTokenizer(99)(["a photo of a ring"], 77)[0]
    assert tokens[0] == 97
    assert tokens[-1] == 98
    assert all(token < 97 for token in tokens[1:-1])
    assert BpeTokenizer(99, pad_id=None).pad_id == 98
    with pytest.raises(KitError, match="at least 3 entries"):
        BpeTokenizer(2)


def test_prompts_are_prepared_before_they_are_read():
    inner = ByteTokenizer()
    lowered = PreparedTokenizer(inner, str.lower)
    assert lowered(["A Red STAR", "a red star"], 64) == inner(["a red star"] * 2, 64)
    assert lowered.pad_id == inner.pad_id

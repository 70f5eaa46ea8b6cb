"""Embeddings from a file: what is written comes back, and a bad file says so."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.text_encoders.precomputed import write

PROMPTS = ["a red star", "灰色背景上，一个大红色星形", "ring", "a red star"]


@pytest.fixture(scope="module")
def encoder():
    return text_encoders.create(
        "concat", encoders=[{"name": "t5", "size": "tiny"}, {"name": "clip", "size": "tiny"}]
    )


@pytest.fixture
def file(encoder, tmp_path):
    path = tmp_path / "embeddings.safetensors"
    assert write(path, encoder, PROMPTS, batch=2) == 4  # three different prompts and the empty one
    return path


def test_round_trip_is_exact(encoder, file):
    stored = text_encoders.create("precomputed", file=file)
    assert (stored.dim, stored.pooled_dim, stored.max_length) == (
        encoder.dim,
        encoder.pooled_dim,
        encoder.max_length,
    )
    assert stored.prompts == ["", "a red star", "灰色背景上，一个大红色星形", "ring"]
    assert stored.made_by == "concat"
    for prompts in (PROMPTS, ["ring"], ["", "ring"]):
        expected, got = encoder(prompts), stored(prompts)
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.mask, expected.mask)
        assert torch.equal(got.pooled, expected.pooled)


def test_nothing_is_padded_on_disk(encoder, file):
    tokens = load_file(file)["tokens"]
    assert len(tokens) == int(encoder(["", *PROMPTS[:3]]).mask.sum())


def test_an_encoder_without_pooled_vector_and_only_the_empty_prompt(tmp_path):
    t5 = text_encoders.create("t5", size="tiny")
    write(tmp_path / "t5.safetensors", t5, [])
    stored = text_encoders.create("precomputed", file=tmp_path / "t5.safetensors")
    assert stored.pooled_dim is None
    assert stored([""]).pooled is None
    assert torch.equal(stored([""]).tokens, t5([""]).tokens)


def test_half_precision_on_disk(encoder, tmp_path):
    for dtype, step in {"bf16": 2**-8, "fp16": 2**-11}.items():  # half a unit in the last place
        path = tmp_path / dtype
        write(path, encoder, PROMPTS, dtype=dtype)
        expected, got = (
            encoder(PROMPTS).tokens,
            text_encoders.create("precomputed", file=path)(PROMPTS).tokens,
        )
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=step, atol=1e-7)
        assert not torch.equal(got, expected)


def test_values_that_overflow_on_disk_are_refused(tmp_path):
    clip = text_encoders.create("clip", size="tiny")
    clip.tower.final_layer_norm.bias.fill_(1e5)
    with pytest.raises(KitError, match="do not fit float16; store them in bf16 or fp32"):
        write(tmp_path / "file", clip, ["ring"], dtype="fp16")
    assert list(tmp_path.iterdir()) == []


def test_max_length_cuts(encoder, file):
    short = text_encoders.create("precomputed", file=file, max_length=3, pad_to_max=True)
    whole = encoder(["a red star"])
    assert torch.equal(short(["a red star"]).tokens, whole.tokens[:, :3])


def test_a_prompt_that_is_not_there_names_the_nearest(file):
    stored = text_encoders.create("precomputed", file=file)
    with pytest.raises(KitError, match=r"prompt 'a red stat' is not in .*; the nearest is 'a red star'"):
        stored(["a red stat"])
    with pytest.raises(KitError, match="it holds 4 others"):
        stored(["zzzzzzzz"])


def test_bad_files_are_one_plain_line(file, tmp_path):
    whole = file.read_bytes()
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(1)}, other)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-50])
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no")
    for path, message in {
        other: "holds no text embeddings",
        cut: "is not a whole safetensors file",
        garbage: "is not a whole safetensors file",
        tmp_path: "is not a whole safetensors file",
        tmp_path / "embeddings": r"do not exist; did you mean '.*embeddings.safetensors'\?",
    }.items():
        with pytest.raises(KitError, match=message) as caught:
            text_encoders.create("precomputed", file=path)
        assert "\n" not in str(caught.value)


def test_offsets_that_do_not_match_are_found(file, tmp_path):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as data:
        metadata = data.metadata()
    tensors = load_file(file)
    tensors["token_ends"] = tensors["token_ends"][:-1].contiguous()
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(KitError, match="is damaged: its prompts and tokens do not match"):
        text_encoders.create("precomputed", file=tmp_path / "damaged.safetensors")


def test_unwritable_target_and_unknown_dtype(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="cannot be written"):
        write(tmp_path / "file" / "inside.safetensors", encoder, ["ring"])
    with pytest.raises(KitError, match="unknown dtype 'int8'"):
        write(tmp_path / "out.safetensors", encoder, ["ring"], dtype="int8")

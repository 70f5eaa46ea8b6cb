"""Text pretraining: the byte vocabulary, span corruption, and a step of the real model."""

from __future__ import annotations

import json

import pytest
import torch

from imagen_kit import text_encoders
from imagen_kit.data.pocket import caption, parse, sample_scenes
from imagen_kit.training import loop, text
from imagen_kit.training.config import TrainConfig

MODEL = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1}


def test_ids_are_those_of_the_byt5_tokenizer():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    for prompt in ("a small red star", "灰色背景上的一个大蓝色圆环", ""):
        assert text.byte_ids(prompt) == tokenizer(prompt).input_ids
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == text.FIRST_SENTINEL
    assert len(tokenizer) >= max(text.TASKS.values()) + 1


def test_corruption_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    for scene in sample_scenes(50, generator):
        ids = text.byte_ids(caption(scene, "zh"))
        source, target = text.corrupt(ids, generator)
        spans: dict[int, list[int]] = {}
        for i in target[:-1]:
            if i >= text.FIRST_SENTINEL:
                spans[i] = []
            else:
                spans[max(spans)].append(i)
        restored = [x for i in source for x in (spans[i] if i >= text.FIRST_SENTINEL else [i])]
        assert restored == ids
        assert len(source) < len(ids)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        (
            "a large red star right of a small blue ring on a gray background",
            "left: small blue ring; right: large red star; gray",
        ),
        (
            "a large red star above a small blue ring on a gray background",
            "top: large red star; bottom: small blue ring; gray",
        ),
        ("白色背景上的一个小粉色心形", "middle: small pink heart; white"),
    ],
)
def test_reading_lists_objects_by_place(prompt, read):
    assert text.reading(parse(prompt)) == read


def test_a_run_writes_an_encoder_that_loads(tmp_path):
    config = TrainConfig(task="text", steps=2, batch_size=4, precision="fp32", sample_every=100)
    task = text.TextTask(config, MODEL)
    task.accuracy = lambda module: {}  # decoding an untrained model to the end is slow and says nothing
    loop.train(task, tmp_path, progress=False)
    assert json.loads((tmp_path / "weights" / "card.json").read_text())["steps"] == 2
    encoder = text_encoders.create("t5", weights=str(tmp_path / "weights"), max_length=80)
    trained = task.module.encoder
    prompt = "a small red star on a white background"
    ids = torch.tensor([text.byte_ids(prompt)])
    # Both sides in float32; the exported weights went through bfloat16, so the module's must too.
    trained.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        expected = trained(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(encoder([prompt]).tokens, expected, atol=1e-5, rtol=1e-5)

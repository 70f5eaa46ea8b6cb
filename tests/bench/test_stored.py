"""Random encoders in files, and rows that read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from imagen_kit import text_encoders
from imagen_kit.bench import stored
from imagen_kit.bench.subject import OURS, Case
from imagen_kit.bench.subjects import build
from imagen_kit.bench.subjects import text_encoder as kind
from imagen_kit.errors import KitError

CPU = torch.device("cpu")


def test_what_is_written_is_an_encoder_in_shards(tmp_path):
    size = stored.write("tiny", tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 3  # two blocks, and the rest
    assert sum(map(os.path.getsize, shards)) == pytest.approx(size, rel=0.2)  # headers
    encoder = text_encoders.create("t5", weights=str(tmp_path), tokenizer="bytes", dtype="bf16")
    weights = encoder.network.state_dict()
    assert 2 * sum(tensor.numel() for tensor in weights.values()) == size
    query = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    assert torch.equal(weights[query.format(0)], weights[query.format(1)])
    drawn = text_encoders.create(
        "t5", weights="random", size="tiny", seed=0, dtype="bf16"
    ).network.state_dict()
    assert torch.equal(weights[query.format(0)], drawn[query.format(0)])  # as random weights are


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    with pytest.raises(KitError, match=r"1\.0 GB free; a t5 of size xxl needs 10\.6 GB"):
        stored.write("xxl", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("execution", ["whole", "streamed", "int8"])
def test_a_row_reads_files_and_removes_them(execution, monkeypatch, tmp_path):
    monkeypatch.setattr(kind.tempfile, "tempdir", str(tmp_path))
    options = {"weights": "stored", "execution": execution, "length": 4, "dtype": "bf16", "peers": "none"}
    subject = build(Case("text_encoder", "t5", options), CPU)[OURS]
    folders = list(Path(tmp_path).iterdir())
    assert len(folders) == 1
    assert (folders[0] / "config.json").is_file()
    assert torch.isfinite(subject()).all()
    assert subject.loading is not None
    assert subject.note.endswith("read from files")
    subject.close()
    assert not list(Path(tmp_path).iterdir())


def test_only_t5_is_stored():
    with pytest.raises(KitError, match="text encoder 'clip' has no weights 'stored'; only t5 has"):
        build(Case("text_encoder", "clip", {"weights": "stored"}), CPU)
    with pytest.raises(KitError, match="did you mean 'stored'"):
        build(Case("text_encoder", "t5", {"weights": "store"}), CPU)

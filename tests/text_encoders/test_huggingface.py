"""Folders, hub ids and the hub's failures, without a network."""

from __future__ import annotations

import json

import pytest
import torch

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.text_encoders import huggingface


def test_locate_tells_folders_from_hub_ids(tmp_path, monkeypatch):
    assert huggingface.locate(tmp_path).folder == tmp_path
    assert huggingface.locate("google/t5-v1_1-xxl") == huggingface.Source("google/t5-v1_1-xxl")
    deep = huggingface.locate("stabilityai/stable-diffusion-xl-base-1.0/text_encoder_2")
    assert (deep.location, deep.subfolder) == ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2")
    assert str(deep) == "stabilityai/stable-diffusion-xl-base-1.0/text_encoder_2"
    assert deep.sibling("tokenizer_2").subfolder == "tokenizer_2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "t5").mkdir(parents=True)
    assert huggingface.locate("google/t5").folder is not None  # a folder here comes first


def test_a_hub_id_reaches_transformers_with_its_subfolder(monkeypatch, tmp_path):
    """The hub is played by a folder: config, weights and tokenizer are asked for in the right places."""
    import transformers as hf

    encoder = text_encoders.create("clip", size="tiny")
    encoder.network.save_pretrained(tmp_path / "text_encoder")
    hf.ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    asked = []

    def redirect(cls, name):
        original = getattr(cls, name)

        def from_pretrained(location, *args, subfolder="", **options):
            asked.append((cls.__name__, location, subfolder))
            return original(str(tmp_path / subfolder), *args, **options)

        monkeypatch.setattr(cls, name, from_pretrained)

    for cls in (hf.AutoConfig, hf.CLIPTextModel, hf.AutoTokenizer):
        redirect(cls, "from_pretrained")
    loaded = text_encoders.create("clip", weights="owner/name/text_encoder")
    # The tokenizer before the weights: finding it absent costs nothing. (It reads a config of its own.)
    assert [call for call in asked if call[1] == "owner/name"] == [
        ("AutoConfig", "owner/name", "text_encoder"),
        ("AutoTokenizer", "owner/name", "tokenizer"),
        ("CLIPTextModel", "owner/name", "text_encoder"),
    ]
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value)


@pytest.mark.parametrize("subfolder", ["", "text_encoder_3"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_t5_from_a_hub_is_asked_for_only_what_it_needs(monkeypatch, tmp_path, saved, subfolder, ending):
    """The hub is played by a folder; pickles are asked for only where there are no safetensors."""
    import huggingface_hub

    network = text_encoders.create("t5", size="tiny").network
    folder = saved(network, tmp_path / subfolder)
    if ending == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(network.state_dict(), folder / "pytorch_model.bin")
    asked = []

    def file(location, name, subfolder=None):
        asked.append((location, name, subfolder))
        return str(tmp_path / (subfolder or "") / name)

    def snapshot(location, allow_patterns, ignore_patterns):
        asked.append(allow_patterns[0])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    spec = "/".join(filter(None, ("owner/name", subfolder)))
    loaded = text_encoders.create("t5", weights=spec, tokenizer="bytes")
    start = f"{subfolder}/" if subfolder else ""
    wanted = [("owner/name", "config.json", subfolder or None), f"{start}*.safetensors"]
    assert asked == wanted + [f"{start}*.bin"] * (ending == "bin")
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value)


def test_an_unreachable_hub_is_one_plain_line(monkeypatch):
    import huggingface_hub
    import transformers as hf

    def fail(*args, **options):
        raise OSError("We couldn't connect\n  to the hub\n")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for name in ("t5", "clip"):
        with pytest.raises(KitError) as caught:
            text_encoders.create(name, weights="owner/name")
        assert str(caught.value) == (
            "config of 'owner/name' cannot be read (not a folder here; tried the Hugging Face hub): "
            "We couldn't connect"
        )


def test_open_clip_repositories_old_and_new(monkeypatch, tmp_path):
    """The safetensors file is preferred, the older pickle is found, an unreachable hub is one line."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from safetensors.torch import save_file

    size = {"embed_dim": 8, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
    weights = text_encoders.create("open_clip", size=size).network.state_dict()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": size}))
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    asked = []

    def download(name, file):
        asked.append(file)
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    old = text_encoders.create("open_clip", weights="owner/name", seed=1)
    assert "open_clip_pytorch_model.bin" in asked
    save_file({key: value + 1 for key, value in weights.items()}, tmp_path / "open_clip_model.safetensors")
    new = text_encoders.create("open_clip", weights="owner/name")
    for key, value in weights.items():
        assert torch.equal(old.network.state_dict()[key], value)
        assert torch.equal(new.network.state_dict()[key], value + 1)

    def unreachable(name, file):
        asked.append(file)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    asked.clear()
    with pytest.raises(KitError, match="nor readable on the Hugging Face hub: no connection"):
        text_encoders.create("open_clip", weights="owner/name")
    assert len(asked) == 1

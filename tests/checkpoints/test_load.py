"""Files and folders: every sort loads to the same network, damaged ones are refused in one plain line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_kit import checkpoints
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError


def same(module, other):
    one, two = module.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refusal(path, **options):
    """The one line that refuses a path."""
    with pytest.raises(KitError) as error:
        checkpoints.load(path, **options)
    line = str(error.value)
    assert "\n" not in line
    assert str(path) in line or Path(path).name in line
    return line


def sharded(folder, tensors, config):
    """A diffusers folder in three shards, with its index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files, stem = {}, "diffusion_pytorch_model"
    for i in range(3):
        name = f"{stem}-{i + 1:05}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::3]}
        save_file(part, folder / name)
        files |= dict.fromkeys(part, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


CONFIG = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 6, "attention_head_dim": 64}


# ---- all sorts of files ---------------------------------------------------------------------------------------


def test_sorts_of_official_files(dit, tmp_path):
    want = checkpoints.from_state_dict(dit)
    save_file(dit, tmp_path / "a.safetensors")
    torch.save(dit, tmp_path / "a.pt")
    torch.save(dit, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    args = argparse.Namespace(model="DiT-S/2")
    torch.save(
        {"model": {k: 0 * v for k, v in dit.items()}, "ema": dit, "args": args, "opt": {}},
        tmp_path / "train.pt",
    )
    torch.save({"state_dict": {f"module.{k}": v for k, v in dit.items()}, "epoch": 3}, tmp_path / "ddp.ckpt")
    for name in ("a.safetensors", "a.pt", "old.pth", "train.pt", "ddp.ckpt"):
        module = checkpoints.load(tmp_path / name)
        assert same(module, want), name
        assert module.checkpoint_origin.format == "dit_official"
        assert not module.training
        assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("length", [0x80, 0x4B50], ids=["pickle", "zip"])
def test_headers_of_a_length_that_looks_like_another_sort_of_file(length, dit, tmp_path):
    """The first byte of a header's length may be a pickle's first byte, or its first two a zip archive's."""
    path = tmp_path / "a.safetensors"
    save_file(dit, path, {"padding": ""})
    missing = (length - int.from_bytes(path.read_bytes()[:8], "little")) % 0x10000
    save_file(dit, path, {"padding": "x" * missing})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert same(checkpoints.load(path), checkpoints.from_state_dict(dit))


def test_folders(dit_diffusers, tmp_path):
    want = checkpoints.from_state_dict(dit_diffusers, config=CONFIG)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    sharded(pipeline / "transformer", dit_diffusers, CONFIG)
    single = tmp_path / "single"
    single.mkdir()
    save_file(dit_diffusers, single / "diffusion_pytorch_model.safetensors")
    (single / "config.json").write_text(json.dumps(CONFIG))
    old = tmp_path / "old"
    old.mkdir()
    torch.save(dit_diffusers, old / "diffusion_pytorch_model.bin")
    (old / "config.json").write_text(json.dumps(CONFIG))
    for place in (
        pipeline,
        pipeline / "transformer",
        single,
        single / "diffusion_pytorch_model.safetensors",
        old,
    ):
        assert same(checkpoints.load(place), want), place
    assert "holds no codec; its parts are transformer" in refusal(pipeline, kind="codec")


def test_parts_of_a_single_file(tmp_path):
    """An SDXL file tells its autoencoder's scale by what else it holds."""
    kwargs = checkpoints.get("kl_official").configure(
        checkpoints.Shapes({k: v.shape for k, v in checkpoints.from_state_dict(_vae()).state_dict().items()}),
        None,
    )
    assert kwargs["scale"] == 0.18215
    whole = {f"first_stage_model.{k}": v for k, v in _vae().items()}
    whole["conditioner.embedders.0.x"] = torch.zeros(1)
    save_file(whole, tmp_path / "xl.safetensors")
    codec = checkpoints.load(tmp_path / "xl.safetensors", kind="codec")
    assert codec.scale == 0.13025
    assert same(codec, checkpoints.from_state_dict(_vae()))


def _vae():
    from random_files import random_tensors

    kwargs = {"channels": 4, "widths": [32, 64], "blocks": 1, "groups": 32, "quant": True, "attend": True}
    return random_tensors("kl_official", kwargs)


def test_old_names_of_diffusers_autoencoders():
    """Published files name the middle attention's layers query, key, value and proj_attn."""
    from random_files import random_tensors

    kwargs = {"channels": 4, "widths": [32, 64], "blocks": 1, "groups": 32, "quant": True, "attend": True}
    new = random_tensors("kl_diffusers", kwargs)
    old = {}
    for key, value in new.items():
        for there, here in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{there}.", f"attentions.0.{here}.")
        old[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    assert same(checkpoints.from_state_dict(old), checkpoints.from_state_dict(new))


def test_dtype_and_device(dit, tmp_path):
    save_file({k: v.half() if k != "pos_embed" else v for k, v in dit.items()}, tmp_path / "half.safetensors")
    assert {p.dtype for p in checkpoints.load(tmp_path / "half.safetensors").parameters()} == {torch.float16}
    wide = checkpoints.load(tmp_path / "half.safetensors", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.blocks[0].attn.qkv.weight, dit["blocks.0.attn.qkv.weight"].half().float())
    hollow = checkpoints.load(tmp_path / "half.safetensors", device="meta")
    assert all(p.is_meta for p in hollow.parameters())


def test_loaded_networks_can_be_trained_and_leave_the_file_alone(dit, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(dit, path)
    before = path.read_bytes()
    module = checkpoints.load(path).train()
    x, t, cond = torch.randn(1, 4, 8, 8), torch.ones(1), Cond(labels=torch.zeros(1, dtype=torch.long))
    module(x, t, cond).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert not torch.equal(module.x_embedder.proj.bias, dit["x_embedder.proj.bias"])
    assert path.read_bytes() == before


def test_the_embedding_is_found_under_either_name():
    weights = load_weights("t5_encoder_transformers", Path(__file__).parents[1] / "data" / "text_encoders")
    for key in ("shared.weight", "encoder.embed_tokens.weight"):
        tensors = {k: v for k, v in weights.items() if k != "shared.weight"} | {key: weights["shared.weight"]}
        network = checkpoints.from_state_dict(tensors).network
        assert torch.equal(network.shared.weight, weights["shared.weight"])


def load_weights(name, folder):
    tensors = load_file(folder / f"{name}.safetensors")
    return {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


def test_an_encoder_without_a_tokenizer_says_so_when_given_text():
    pytest.importorskip("transformers")
    weights = load_weights("t5_encoder_transformers", Path(__file__).parents[1] / "data" / "text_encoders")
    weights["shared.weight"] = torch.randn(500, weights["shared.weight"].shape[1])  # no byte vocabulary
    encoder = checkpoints.from_state_dict(weights)
    with pytest.raises(KitError, match="'t5' came without a tokenizer"):
        encoder(["a red star"])


# ---- economy --------------------------------------------------------------------------------------------------

# The high-water mark is that of this process's own memory (getrusage's would count what started it), from now on.
PROBE = """
import json, re, sys, torch
from imagen_kit import checkpoints
checkpoints.load(sys.argv[1])  # libraries and code are in memory now
open("/proc/self/clear_refs", "w").write("5")
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
module = checkpoints.load(sys.argv[2], dtype=eval(sys.argv[3]))
pieces = (piece for p in module.parameters() for piece in p.detach().flatten().split(10_000))
total = sum(float(piece.double().sum()) for piece in pieces)  # every page is read, without a copy of a whole tensor
size = sum(p.numel() * p.element_size() for p in module.parameters())
print(json.dumps([peak() - before, size, total]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Files of about 150 MB in which no tensor is more than a twentieth, and small ones of the same sort."""
    from random_files import DIT, random_tensors

    folder, sums = tmp_path_factory.mktemp("large"), {}
    for name, suffix, depth in (("dit_official", "pt", 18), ("dit_diffusers", "safetensors", 16)):
        kwargs = {**DIT, "num_classes": 50, "width": 384}
        if suffix == "safetensors":
            kwargs["details"] = {**DIT["details"], "frequency_shift": 1.0, "block_embedders": True}
        for stem, blocks in (("small", 1), ("large", depth)):
            tensors = random_tensors(name, {**kwargs, "depth": blocks})
            torch.save(tensors, folder / f"{stem}.pt") if suffix == "pt" else save_file(
                tensors, folder / f"{stem}.safetensors"
            )
        tensors.pop("pos_embed", None)
        sums[suffix] = {
            dtype: sum(float(t.to(dtype).sum(dtype=torch.float64)) for t in tensors.values())
            for dtype in (None, torch.bfloat16)
        }
    return folder, sums


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory"
)
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("pt", None), ("safetensors", None), ("safetensors", torch.bfloat16)],
    ids=["renamed", "joined", "cast"],
)
def test_peak_memory_is_that_of_the_weights(suffix, dtype, large):
    """At most 1.1 times the weights, also where q, k and v are joined or dtypes change; measured in a process."""
    folder, sums = large
    words = [folder / f"small.{suffix}", folder / f"large.{suffix}", dtype]
    out = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak, size, total = json.loads(out.stdout)
    assert size == pytest.approx((folder / f"large.{suffix}").stat().st_size / (2 if dtype else 1), rel=0.01)
    assert size > (130e6 if dtype is None else 65e6)
    assert 0.9 * size < peak < 1.1 * size + 6e6  # and some megabytes of the interpreter itself
    assert total == pytest.approx(sums[suffix][dtype], rel=1e-9)


def test_nothing_is_read_before_it_is_asked_for(dit, tmp_path):
    """A file of ten gigabytes of holes is looked through at once."""
    save_file(dit, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = max(entry["data_offsets"][1] for entry in header.values())
    header["huge"] = {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [end, end + 10_000_000_000]}
    text = json.dumps(header).encode()
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end + 10_000_000_000)
    assert "1 extra (huge)" in refusal(tmp_path / "huge.safetensors")


# ---- bad input ------------------------------------------------------------------------------------------------


def test_one_renamed_one_missing_one_transposed(dit, tmp_path):
    damaged = dict(dit)
    damaged["blocks.1.attn.qkw.weight"] = damaged.pop("blocks.1.attn.qkv.weight")
    del damaged["t_embedder.mlp.0.bias"]
    damaged["blocks.0.mlp.fc1.weight"] = damaged["blocks.0.mlp.fc1.weight"].T.contiguous()
    damaged["surplus"] = torch.zeros(3)
    save_file(damaged, tmp_path / "a.safetensors")
    line = refusal(tmp_path / "a.safetensors")
    assert "is not a whole dit_official checkpoint" in line
    assert "2 missing" in line
    assert "blocks.1.attn.qkv.weight (there is blocks.1.attn.qkw.weight)" in line
    assert "t_embedder.mlp.0.bias" in line
    assert "2 extra" in line
    assert "surplus" in line
    assert "1 misshapen (blocks.0.mlp.fc1.weight is 384×1536, should be 1536×384)" in line


@pytest.mark.parametrize("name", ["dit_official", "dit_diffusers", "kl_official", "kl_diffusers"])
@pytest.mark.parametrize("damage", ["missing", "renamed", "transposed", "extra"])
def test_faults_of_any_tensor_are_found(name, damage, dit, dit_diffusers):
    """Whichever tensor it is, also those that tell the architecture or its size."""
    from random_files import random_tensors

    kwargs = {"channels": 4, "widths": [32, 64], "blocks": 1, "groups": 32, "quant": True, "attend": True}
    whole = {"dit_official": dit, "dit_diffusers": dit_diffusers}.get(name) or random_tensors(name, kwargs)
    config = CONFIG if name == "dit_diffusers" else None
    start = ("missing", "renamed", "transposed", "extra").index(damage)
    for key, tensor in list(whole.items())[start % 3 :: 3]:  # another third for each damage
        tensors = dict(whole)
        if damage in ("missing", "renamed"):
            del tensors[key]
        if damage == "renamed":
            tensors[key[:-1] + "_"] = tensor
        if damage == "extra":
            tensors[key + "2"] = tensor
        if damage == "transposed":
            if tensor.ndim < 2 or tensor.shape[0] == tensor.shape[1]:
                continue
            tensors[key] = tensor.transpose(0, 1)
        with pytest.raises(KitError) as error:
            checkpoints.from_state_dict(tensors, config=config)
        assert key in str(error.value) or damage == "transposed", f"{key}: {error.value}"
        assert "\n" not in str(error.value)


def test_a_table_with_other_numbers(dit):
    dit["pos_embed"] = dit["pos_embed"].roll(1, 1)
    with pytest.raises(KitError, match="pos_embed is not the table that this network computes"):
        checkpoints.from_state_dict(dit)


def test_another_architecture(tmp_path):
    save_file(
        {"conv1.weight": torch.ones(3), "layer1.0.bn1.bias": torch.ones(2)}, tmp_path / "resnet.safetensors"
    )
    line = refusal(tmp_path / "resnet.safetensors")
    assert "no architecture known here" in line
    assert "dit" in line


def test_another_format_than_named(dit, tmp_path):
    save_file(dit, tmp_path / "a.safetensors")
    assert "no architecture known" in refusal(tmp_path / "a.safetensors", format="kl_official")
    with pytest.raises(KitError, match="did you mean 'dit_official'"):
        checkpoints.load(tmp_path / "a.safetensors", format="dit_oficial")
    with pytest.raises(KitError, match="unknown kind of checkpoint 'sampler'"):
        checkpoints.load(tmp_path / "a.safetensors", kind="sampler")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_empty_and_rubbish(suffix, dit, tmp_path):
    path = tmp_path / f"a.{suffix}"
    torch.save(dit, path) if suffix == "pt" else save_file(dit, path)
    raw = path.read_bytes()
    for cut in (len(raw) - 1, len(raw) // 2, 100, 9, 3):
        path.write_bytes(raw[:cut])
        assert any(word in refusal(path) for word in ("truncated", "not a whole", "cut off")), cut
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    path.write_bytes(b"<html>not found</html>" * 50)
    assert any(word in refusal(path) for word in ("not a whole", "not a safetensors file"))
    assert "do not exist; did you mean" in refusal(tmp_path / f"b.{suffix}")


class Evil:
    """What a pickle can do when it is believed."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("sort", ["torch", "legacy", "plain", "nested", "safetensors-named"])
def test_code_in_a_pickle_is_never_run(sort, dit, tmp_path):
    marker, path = tmp_path / "was_here", tmp_path / "a.pt"
    content = {**dit, "x": Evil(marker)}
    if sort == "plain":
        path.write_bytes(pickle.dumps(content["x"]))
    elif sort == "nested":
        torch.save({"state_dict": dit, "callbacks": [Evil(marker)]}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=sort != "legacy")
    if sort == "safetensors-named":
        path = path.rename(tmp_path / "a.safetensors")
    line = refusal(path)
    assert not marker.exists()
    assert "a pickle with code in it, which is never run" in line
    assert zipfile.is_zipfile(path) == (sort not in ("legacy", "plain"))  # the test wrote what it says


def test_shards(dit_diffusers, tmp_path):
    folder = sharded(tmp_path / "a", dit_diffusers, CONFIG)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    lost = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    kept = lost.read_bytes()
    lost.unlink()
    assert "shard diffusion_pytorch_model-00002-of-00003.safetensors is missing" in refusal(folder)
    lost.write_bytes(kept[:-10])
    assert "truncated" in refusal(lost)
    lost.write_bytes(kept)
    index.write_text(json.dumps({"weight_map": table["weight_map"] | {"ghost": lost.name}}))
    assert "1 tensors of the index are in no shard, e.g. ghost" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert "outside its folder" in refusal(folder)
    index.write_text("{")
    assert "is not a JSON file" in refusal(folder)


def test_folders_that_are_no_checkpoint(dit, tmp_path):
    assert "it holds none" in refusal(tmp_path)
    for name in ("a", "b"):
        save_file(dit, tmp_path / f"{name}.safetensors")
    assert "several: a.safetensors, b.safetensors; name one" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "not a JSON object" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "not the bytes of its shape"),
        ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, "dtype X9"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "not the bytes of its shape"),
        ({"a": {"dtype": "F32"}}, "not a safetensors file"),
        ({}, "holds no tensors"),
    ],
)
def test_damaged_headers(header, said, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert said in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": "many"}, "its size cannot be told from its config"),
        ({"norm_type": "layer_norm"}, "only 'ada_norm_zero' is DiT"),
        ({"num_layers": 3}, "missing (transformer_blocks.2."),
        ({"num_attention_heads": 5}, "width 384 must be a multiple of heads (5)"),
        ({"out_channels": 5}, "out_channels 5"),
    ],
)
def test_configs_that_do_not_fit(change, said, dit_diffusers):
    with pytest.raises(KitError) as error:
        checkpoints.from_state_dict(dit_diffusers, config=CONFIG | change)
    assert said in str(error.value)


def test_a_width_without_heads():
    from random_files import DIT, random_tensors

    with pytest.raises(KitError, match="width 64 is of no published DiT, so its number of heads is unknown"):
        checkpoints.from_state_dict(random_tensors("dit_official", {**DIT, "width": 64, "heads": 2}))

"""T5 with its blocks streamed or in eight bits: the same embeddings, or near ones, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.performance.prepacking import packs
from imagen_kit.text_encoders.t5 import T5TextEncoder

PROMPTS = ["a large red star on a white background", "圆环", ""]
SIZE = {
    "model_type": "t5",
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 5,
    "feed_forward_proj": "gated-gelu",
}


def sharded(network, folder, shards=3):
    """The folder of a network in several files with an index, as transformers writes large ones."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(network.settings)))
    state, where = network.state_dict(), {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[shard::shards])
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["t5", "umt5"])
@pytest.mark.parametrize("layer", ["last", -3])
def test_streamed_is_the_whole_bit_for_bit(dtype, kind, layer):
    options = {"size": {**SIZE, "model_type": kind}, "dtype": dtype, "layer": layer, "seed": 4}
    whole, streamed = (T5TextEncoder(**options, execution=e)(PROMPTS) for e in ("whole", "streamed"))
    assert torch.equal(whole.tokens, streamed.tokens)
    assert torch.equal(whole.mask, streamed.mask)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("execution", ["streamed", "int8"])
def test_out_of_files_as_out_of_one_memory(tmp_path, saved, shards, execution):
    network = T5TextEncoder(size=SIZE, seed=7).network
    if shards == 1:
        folder = saved(network, tmp_path / "t5")
    else:
        folder = sharded(network, tmp_path / "t5", shards)
    stored = T5TextEncoder(folder, execution=execution)
    random = T5TextEncoder(size=SIZE, seed=7, execution=execution)
    assert torch.equal(stored(PROMPTS).tokens, random(PROMPTS).tokens)
    with pytest.raises(KitError, match="fp16"):
        stored.half()
    low = stored.to(torch.bfloat16)(PROMPTS).tokens  # moved as any encoder, embeddings made anew
    expected = T5TextEncoder(size=SIZE, seed=7, execution=execution, dtype="bf16")(PROMPTS).tokens
    assert torch.equal(low, expected)


def test_streamed_blocks_hold_no_memory_and_count_when_hollow():
    streamed = T5TextEncoder(size=SIZE, execution="streamed")
    table = 384 * 32
    assert sum(p.numel() for p in streamed.parameters()) == table + 32  # and the last norm
    streamed(["ring"])
    assert all(p.is_meta for block in streamed.network.encoder.block for p in block.parameters())
    with torch.device("meta"):
        hollow = T5TextEncoder(size=SIZE, execution="streamed")
    whole = T5TextEncoder(size=SIZE)
    assert sum(p.numel() for p in hollow.parameters()) == sum(p.numel() for p in whole.parameters())


def test_eight_bits_are_near_the_whole():
    whole, rough = (T5TextEncoder(size=SIZE, seed=2, execution=e)(PROMPTS) for e in ("whole", "int8"))
    error = (rough.tokens - whole.tokens)[whole.mask].square().mean().sqrt()
    # A step is max|w|/127 of a row; of 32 to 64 normal numbers the largest is about 2.5 σ, so that the error of a
    # weight, step/√12, is 0.6 % of σ, and that of a layer's output 0.6 % of it. Ten layers in a row add up to
    # √10 · 0.6 % = 1.8 % of embeddings whose mean square is 1; three times that for the gate's product.
    assert 0.001 < error < 0.054
    assert whole.tokens[whole.mask].square().mean().sqrt() == pytest.approx(1, abs=1e-3)


def test_packed_is_the_whole_up_to_rounding(tmp_path, saved):
    wide = {**SIZE, "d_model": 256, "d_ff": 256, "d_kv": 64}
    whole, packed = (T5TextEncoder(size=wide, seed=2, execution=e) for e in ("whole", "packed"))
    assert any(parameter.is_mkldnn for parameter in packed.parameters()) == packs()
    # some twenty sums of 256 numbers in float32, of embeddings whose mean square is 1
    torch.testing.assert_close(packed(PROMPTS).tokens, whole(PROMPTS).tokens, rtol=0, atol=2e-5)
    stored = T5TextEncoder(saved(whole.network, tmp_path / "t5"), execution="packed")
    assert torch.equal(stored(PROMPTS).tokens, packed(PROMPTS).tokens)
    low = packed.to(torch.bfloat16)(PROMPTS).tokens  # plain again, as where it goes to another device
    assert torch.equal(low, T5TextEncoder(size=wide, seed=2, dtype="bf16")(PROMPTS).tokens)


def test_a_damaged_folder_is_refused_before_anything_is_encoded(tmp_path, saved):
    folder = saved(T5TextEncoder(size=SIZE).network, tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 65}))
    with pytest.raises(KitError, match=r"wi_0\.weight is \(64, 32\) instead of \(65, 32\)"):
        text_encoders.create("t5", weights=str(folder), execution="streamed")
    with pytest.raises(KitError, match=r"unknown t5 execution 'int4'; did you mean 'int8'\?"):
        text_encoders.create("t5", size="tiny", execution="int4")


# The high-water mark of a process of its own, above what it held before the encoder was made.
PROBE = """
import json, sys, torch
from imagen_kit.text_encoders.t5 import T5TextEncoder
torch.set_num_threads(1)
held = lambda key: int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024
torch.nn.functional.linear(torch.randn(8, 8), torch.randn(8, 8))
before = held("VmRSS")
execution, source = json.loads(sys.argv[1])
size = {"d_model": 512, "d_ff": 2048, "num_layers": 12, "num_heads": 8, "feed_forward_proj": "gated-gelu"}
options = {"size": size} if source == "random" else {}
encoder = T5TextEncoder(source, tokenizer="bytes", execution=execution, **options)
encoder(["a ring"])
print(held("VmHWM") - before)
"""
TABLE, BLOCK = 32128 * 512 * 4, (4 * 512 * 512 + 3 * 512 * 2048) * 4  # bytes in float32


def peak(execution, source="random"):
    words = [sys.executable, "-c", PROBE, json.dumps([execution, str(source)])]
    # glibc gives memory above a size back at once; so that it does with layers smaller than a real encoder's too.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(words, check=True, capture_output=True, text=True, env=surroundings)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_memory_is_that_of_the_embeddings_and_two_blocks(tmp_path, saved):
    # Besides: one more tensor in making (the largest is the table of random weights, drawn and then copied),
    # and libraries' own buffers, of which 40 MB is more than was seen.
    slack = 40e6
    assert peak("streamed") < 2 * TABLE + 2 * BLOCK + slack
    whole = TABLE + 12 * BLOCK
    assert peak("int8") < 2 * TABLE + 12 * BLOCK / 4 + BLOCK / 2 + slack < 0.9 * whole
    size = {"d_model": 512, "d_ff": 2048, "num_layers": 12, "num_heads": 8, "feed_forward_proj": "gated-gelu"}
    folder = saved(T5TextEncoder(size=size, tokenizer="bytes").network, tmp_path / "t5")
    from_file = peak("streamed", folder)
    assert from_file < 2 * TABLE + 2 * BLOCK + slack

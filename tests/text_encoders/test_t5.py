"""T5: against recorded and live references, padding, precision, and every way to load it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.text_encoders.t5 import SIZES, T5TextEncoder

PROMPTS = [
    "a large red star on a white background",
    "灰色背景上，一个大红色星形在一个小蓝色圆环的上方",
    "",
    "ring",
]
# Sums run in another order when a batch is padded or split: some float32 rounding of values of order 1.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def tiny() -> T5TextEncoder:
    return T5TextEncoder(size="tiny", max_length=160, cache=0)


@pytest.mark.parity
@pytest.mark.parametrize("padding", ["masked", "kept"])
def test_equals_recorded_transformers_encoder(reference, unpadded, tmp_path, padding):
    recorded = reference("t5_encoder_transformers")
    folder = recorded.folder(tmp_path, model_type="t5")
    encoder = T5TextEncoder(folder, tokenizer="bytes", max_length=48, padding=padding)
    lengths = recorded.inputs["attention_mask"].sum(1)
    rows = list(encoder._embed(unpadded(recorded.inputs["input_ids"], lengths)))
    expected = recorded.outputs["last_hidden_state"]
    for row, whole, length in zip(rows, expected, lengths, strict=True):
        wanted = whole[:length] if padding == "masked" else whole
        torch.testing.assert_close(row.tokens, wanted, atol=recorded.tolerance("last_hidden_state"), rtol=0)


@pytest.mark.parity
def test_attended_padding_equals_recorded_encoder_without_mask(reference, unpadded, tmp_path):
    recorded = reference("t5_encoder_transformers")
    folder = recorded.folder(tmp_path, model_type="t5")
    encoder = T5TextEncoder(folder, tokenizer="bytes", max_length=48, padding="attended")
    rows = encoder._embed(unpadded(recorded.inputs["input_ids"], recorded.inputs["attention_mask"].sum(1)))
    got = torch.stack([row.tokens for row in rows])
    expected = recorded.outputs["last_hidden_state_nomask"]
    torch.testing.assert_close(got, expected, atol=recorded.tolerance("last_hidden_state_nomask"), rtol=0)


@pytest.mark.parity
def test_intermediate_layer_is_the_normalised_output_of_that_block(reference, unpadded, tmp_path):
    recorded = reference("t5_encoder_transformers")
    folder = recorded.folder(tmp_path, model_type="t5")
    encoder = T5TextEncoder(folder, tokenizer="bytes", max_length=48, padding="kept", layer=-3)
    rows = encoder._embed(unpadded(recorded.inputs["input_ids"], recorded.inputs["attention_mask"].sum(1)))
    raw = recorded.outputs["hidden_states.1"].double()
    weight = recorded.weights["encoder.final_layer_norm.weight"].double()
    expected = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    # Values of order 1; the recorded block output carries 1.6e-6 of rounding.
    torch.testing.assert_close(torch.stack([r.tokens for r in rows]).double(), expected, atol=1e-5, rtol=0)
    penultimate = T5TextEncoder(folder, tokenizer="bytes", layer="penultimate")
    assert penultimate.block == 2


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_embedding_under_any_published_name(reference, tmp_path, stored):
    recorded = reference("t5_encoder_transformers")
    folder = recorded.folder(tmp_path, model_type="t5")
    weights = dict(recorded.weights)
    table = weights.pop("shared.weight")
    names = ["shared.weight", "encoder.embed_tokens.weight"] if stored == "both" else [stored]
    save_file(
        {**weights, **{name: table.clone() for name in names}}, folder / "model.safetensors", {"format": "pt"}
    )
    encoder = T5TextEncoder(folder, tokenizer="bytes")
    assert torch.equal(encoder.network.shared.weight, table)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_folder_of_a_whole_model_equals_live_transformers(tmp_path, kind):
    """The encoder half of an encoder-decoder folder, in each family, read as bytes: no tokenizer file."""
    import transformers as hf

    classes = {
        "t5": (hf.T5Config, hf.T5ForConditionalGeneration),
        "mt5": (hf.MT5Config, hf.MT5ForConditionalGeneration),
        "umt5": (hf.UMT5Config, hf.UMT5ForConditionalGeneration),
    }
    torch.manual_seed(1)
    settings = classes[kind][0](
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = classes[kind][1](settings).eval()
    model.save_pretrained(tmp_path)
    encoder = text_encoders.create("t5", weights=str(tmp_path), max_length=160)
    got = encoder(PROMPTS)
    batch = hf.ByT5Tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.equal(got.mask, batch.attention_mask.bool())
    expected = out.last_hidden_state * batch.attention_mask[..., None]
    torch.testing.assert_close(got.tokens, expected, atol=ROUNDING, rtol=0)


def test_folder_in_the_package_loads_and_equals_the_saved_network(monkeypatch, tmp_path, tiny, saved):
    from imagen_kit import weights_path

    saved(tiny.network, tmp_path / "weights" / "pocket" / "t5")
    monkeypatch.setattr(weights_path, "__file__", str(tmp_path / "weights_path.py"))
    encoder = text_encoders.create("t5", weights="package:pocket/t5", max_length=160)
    assert torch.equal(encoder(PROMPTS).tokens, tiny(PROMPTS).tokens)


def test_half_precision_file_is_read_into_float32(tmp_path, tiny, saved):
    saved(tiny.network, tmp_path)
    halves = {key: value.bfloat16() for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    encoder = T5TextEncoder(tmp_path)
    state = encoder.network.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    for key, value in halves.items():
        assert torch.equal(state[key], value.float())
    assert {p.dtype for p in T5TextEncoder(tmp_path, dtype="bf16").parameters()} == {torch.bfloat16}


def test_padding_length_does_not_change_the_result(tiny):
    short = tiny(["ring"])
    tiny_padded = T5TextEncoder(size="tiny", max_length=160, pad_to_max=True)
    long = tiny_padded(["ring"])
    assert long.tokens.shape == (1, 160, 64)
    torch.testing.assert_close(long.tokens[:, :5], short.tokens, atol=0, rtol=0)  # padded after encoding
    ids = tiny.tokenizer(["ring"], 160)
    padded = torch.tensor([ids[0] + [0] * 155])
    mask = torch.arange(160)[None] < 5
    with torch.no_grad():
        inside, _ = tiny._run(padded, mask, torch.tensor([4]))  # padded inside the network
    torch.testing.assert_close(inside[:, :5], short.tokens, atol=ROUNDING, rtol=0)


def test_masked_positions_are_exactly_zero_and_mixed_batches_equal_single_prompts(tiny):
    batch = tiny(PROMPTS)
    assert batch.tokens.dtype == torch.float32
    assert batch.mask.sum(1).tolist() == [len(p.encode()) + 1 for p in PROMPTS]
    assert (batch.tokens[~batch.mask] == 0).all()
    assert (batch.tokens[batch.mask].abs().sum(-1) > 0).all()
    for i, prompt in enumerate(PROMPTS):
        alone = tiny([prompt])
        assert alone.mask.all()
        torch.testing.assert_close(batch.tokens[i, batch.mask[i]], alone.tokens[0], atol=ROUNDING, rtol=0)


def test_chinese_prompts_differ_by_one_character(tiny):
    red, blue = tiny(["红色圆形"]), tiny(["蓝色圆形"])
    assert red.tokens.shape == blue.tokens.shape == (1, 13, 64)  # four characters of three bytes, and the end
    assert (red.tokens - blue.tokens).abs().amax() > 0.1


def test_long_prompts_are_cut_with_the_end_token_kept():
    encoder = T5TextEncoder(size="tiny", max_length=8)
    out = encoder(["a" * 50])
    assert out.tokens.shape == (1, 8, 64)
    assert encoder.tokenizer(["a" * 50], 8)[0][-1] == 1


def test_fp16_is_refused_everywhere_and_leaves_the_encoder_whole():
    with pytest.raises(KitError, match="overflows in fp16; use bf16 or fp32"):
        T5TextEncoder(size="tiny", dtype="fp16")
    encoder = T5TextEncoder(size="tiny")
    for cast in (
        lambda: encoder.half(),
        lambda: encoder.to(torch.float16),
        lambda: nn.Sequential(encoder).half(),
    ):
        with pytest.raises(KitError, match="fp16"):
            cast()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_bf16_is_near_fp32_and_answers_in_float32(tiny):
    low = T5TextEncoder(size="tiny", max_length=160, dtype="bf16")(PROMPTS)
    high = tiny(PROMPTS)
    assert low.tokens.dtype == torch.float32
    error = (low.tokens - high.tokens)[high.mask].square().mean().sqrt()
    assert 0 < error < 0.05  # bfloat16 keeps 8 bits of values of order 1: 4e-3 a rounding, some tens of them


def test_random_weights_repeat_with_their_seed():
    one, same, other = (T5TextEncoder(size="tiny", seed=seed)(["ring"]).tokens for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert (one - other).abs().amax() > 0.1


def test_building_random_weights_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    T5TextEncoder(size="tiny")
    assert torch.equal(torch.rand(1), expected)


def test_dict_sizes_fold_bytes_into_a_small_vocabulary():
    size = {
        "model_type": "umt5",
        "d_model": 16,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 1,
        "d_kv": 8,
        "vocab_size": 50,
    }
    encoder = T5TextEncoder(size=size)
    assert encoder.network.encoder.block[0].layer[0].SelfAttention.relative_attention_bias is not None
    assert encoder(PROMPTS).tokens.shape[2] == encoder.dim == 16


@pytest.mark.parity
def test_xxl_is_the_published_network(published_keys):
    keys, _ = published_keys("t5_v1_1_xxl_encoder")
    with torch.device("meta"):
        encoder = T5TextEncoder(size="xxl", dtype="fp32")
    shapes = {key: tuple(value.shape) for key, value in encoder.network.state_dict().items()}
    assert shapes == keys
    assert encoder.dim == 4096


@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_named_size_is_a_config_that_builds(size):
    with torch.device("meta"):
        encoder = T5TextEncoder(size=size, max_length=77)
    assert encoder.dim == SIZES[size]["d_model"]
    count = sum(p.numel() for p in encoder.network.parameters())
    # "auto": bf16 from a billion parameters on
    assert next(encoder.parameters()).dtype == (torch.bfloat16 if count >= 1e9 else torch.float32)


def test_not_finite_embeddings_are_an_error_that_names_the_block():
    encoder = T5TextEncoder(size="tiny")
    with torch.no_grad():
        encoder.network.encoder.block[1].layer[1].DenseReluDense.wo.weight[0, 0] = torch.inf
    with pytest.raises(KitError, match=r"'t5' in float32 gives values that are not finite from block 2 on"):
        encoder(["ring"])
    with torch.no_grad():
        encoder.network.shared.weight[ord("r") + 3] = torch.nan
    with pytest.raises(KitError, match="in the embeddings"):
        encoder(["ring"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "smal"}, r"unknown t5 size 'smal'; did you mean 'small'\?"),
        ({"size": {"d_modell": 3}}, r"no field 'd_modell'; did you mean 'd_model'\?"),
        ({"size": {"model_type": "bert"}}, "unknown t5 model_type 'bert'"),
        ({"size": "tiny", "layer": "first"}, "unknown t5 layer 'first'"),
        ({"size": "tiny", "layer": -3}, "has 2 blocks; layer -3 must be between -2 and -1"),
        ({"size": "tiny", "padding": "mask"}, r"unknown padding 'mask'; did you mean 'masked'\?"),
        ({"size": "tiny", "dtype": "float8"}, "unknown dtype 'float8'"),
        ({"size": "tiny", "max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"weights": "./no/such/folder"}, "do not exist"),
        ({"weights": "package:no-such"}, "do not exist"),
        ({"weights": "not a name!"}, "neither an existing folder nor a hub id"),
    ],
)
def test_bad_options_are_one_plain_line(options, message):
    with pytest.raises(KitError, match=message) as caught:
        text_encoders.create("t5", **options)
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_one_plain_line(tmp_path, tiny, saved):
    def folder(name):
        return saved(tiny.network, tmp_path / name)

    cut = folder("cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    empty = folder("empty")
    (empty / "model.safetensors").write_bytes(b"")
    garbage = folder("garbage")
    (garbage / "model.safetensors").write_bytes(b"not a safetensors file" * 100)
    unconfigured = folder("unconfigured")
    (unconfigured / "config.json").unlink()
    broken = folder("broken")
    (broken / "config.json").write_text("{")
    missing = folder("missing")
    weights = load_file(missing / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, missing / "model.safetensors", {"format": "pt"})
    extra = folder("extra")
    weights = load_file(extra / "model.safetensors")
    save_file({**weights, "surplus.weight": torch.ones(2)}, extra / "model.safetensors", {"format": "pt"})
    shape = folder("shape")
    weights = load_file(shape / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] = torch.ones(63)
    save_file(weights, shape / "model.safetensors", {"format": "pt"})
    other = folder("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "clip_text_model"}))
    messages = {
        cut: "weights of .*cut' cannot be read",
        empty: "weights of .* cannot be read",
        garbage: "weights of .* cannot be read",
        unconfigured: "have no config.json",
        broken: "config of .* cannot be read",
        missing: "missing encoder.final_layer_norm.weight",
        extra: "extra surplus.weight",
        shape: r"encoder.final_layer_norm.weight is \(63,\) instead of \(64,\)",
        other: "hold a 'clip_text_model' network; text encoder 't5' reads t5, mt5, umt5",
        cut / "model.safetensors": "are a file; a folder",
    }
    for path, message in messages.items():
        with pytest.raises(KitError, match=message) as caught:
            T5TextEncoder(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(KitError, match="not of t5 size 'small': d_model is 64, not 512"):
        T5TextEncoder(folder("sized"), size="small")


def test_a_vocabulary_that_is_not_bytes_needs_a_tokenizer(tmp_path, saved):
    encoder = T5TextEncoder(
        size={"d_model": 16, "d_ff": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 1000}
    )
    saved(encoder.network, tmp_path)
    with pytest.raises(KitError, match=r"come without a tokenizer .* option 'tokenizer'"):
        T5TextEncoder(tmp_path)
    assert T5TextEncoder(tmp_path, tokenizer="bytes")(["ring"]).tokens.shape == (1, 5, 16)

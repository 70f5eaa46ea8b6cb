"""CLIP text towers in the Hugging Face format: recorded and live references, layers, pooling, padding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.text_encoders.clip import ClipTextEncoder

PROMPTS = ["a large red star on a white background", "ring", ""]
# Sums run in another order when a batch is padded or split: some float32 rounding of values of order 1.
ROUNDING = 5e-6
TOWERS = {"clip_l_text_transformers": "eos", "clip_g_text_proj_transformers": "projection"}


@pytest.fixture(scope="module")
def tiny() -> ClipTextEncoder:
    return ClipTextEncoder(size="tiny", cache=0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "published"), [(name, True) for name in TOWERS] + [("clip_l_text_transformers", False)]
)
def test_equals_recorded_tower(reference, unpadded, tmp_path, name, published):
    """Tokens and pooled vector, from names with the published ``text_model.`` prefix and without."""
    recorded = reference(name)
    folder = recorded.folder(tmp_path, model_type="clip_text_model")
    if not published:
        bare = {key.removeprefix("text_model."): value for key, value in recorded.weights.items()}
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
    encoder = ClipTextEncoder(folder, pooled=TOWERS[name])
    lengths = recorded.inputs["attention_mask"].sum(1)
    rows = list(encoder._embed(unpadded(recorded.inputs["input_ids"], lengths)))
    tolerance = recorded.tolerance("last_hidden_state")
    for row, whole, length in zip(rows, recorded.outputs["last_hidden_state"], lengths, strict=True):
        torch.testing.assert_close(row.tokens, whole[:length], atol=tolerance, rtol=0)
    output = {"eos": "pooler_output", "projection": "text_embeds"}[TOWERS[name]]
    pooled = torch.stack([row.pooled for row in rows])
    torch.testing.assert_close(pooled, recorded.outputs[output], atol=recorded.tolerance(output), rtol=0)
    assert encoder.pooled_dim == pooled.shape[1]
    assert encoder.max_length == 16


@pytest.mark.parity
@pytest.mark.parametrize("name", TOWERS)
def test_padded_modes_equal_the_recorded_outputs(reference, unpadded, tmp_path, name):
    recorded = reference(name)
    folder = recorded.folder(tmp_path, model_type="clip_text_model")
    ids = unpadded(recorded.inputs["input_ids"], recorded.inputs["attention_mask"].sum(1))
    for padding, output in {"attended": "last_hidden_state", "kept": "last_hidden_state_masked"}.items():
        encoder = ClipTextEncoder(folder, padding=padding, pooled=None)
        # The recorded inputs pad as the two published families do: with the end token, and with 0.
        encoder.tokenizer.pad_id = int(recorded.inputs["input_ids"][1, -1])
        got = torch.stack([row.tokens for row in encoder._embed(ids)])
        torch.testing.assert_close(got, recorded.outputs[output], atol=recorded.tolerance(output), rtol=0)


@pytest.mark.parity
def test_penultimate_layer_raw_and_normed(reference, unpadded, tmp_path):
    recorded = reference("clip_g_text_proj_transformers")
    folder = recorded.folder(tmp_path, model_type="clip_text_model")
    ids = unpadded(recorded.inputs["input_ids"], [16, 16, 16])
    raw = recorded.outputs["hidden_states.2"]
    encoder = ClipTextEncoder(folder, layer="penultimate", final_norm=False, pooled="projection")
    rows = list(encoder._embed(ids))
    got = torch.stack([row.tokens for row in rows])
    torch.testing.assert_close(got, raw, atol=recorded.tolerance("hidden_states.2"), rtol=0)
    weight, bias = (recorded.weights[f"text_model.final_layer_norm.{part}"] for part in ("weight", "bias"))
    normed = torch.nn.functional.layer_norm(raw, (raw.shape[-1],), weight, bias, 1e-5)
    encoder = ClipTextEncoder(folder, layer=-2, pooled=None)
    got = torch.stack([row.tokens for row in encoder._embed(ids)])
    torch.testing.assert_close(got, normed, atol=recorded.tolerance("hidden_states.2"), rtol=0)
    last = ClipTextEncoder(folder, final_norm=False, pooled=None)
    got = torch.stack([row.tokens for row in last._embed(ids)])
    expected = recorded.outputs["hidden_states.3"]
    torch.testing.assert_close(got, expected, atol=recorded.tolerance("hidden_states.3"), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole-clip"])
def test_folder_with_its_tokenizer_equals_live_transformers(tmp_path, whole):
    """The folder's own tokenizer is used, the image tower of a whole CLIP is left aside."""
    import transformers as hf

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "r": 2, "i": 3, "n": 4, "g</w>": 5, "a</w>": 6}
    tokenizer = hf.CLIPTokenizer(
        vocab=vocabulary, merges=[], pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**small, "vocab_size": 7, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    if whole:
        picture = {**small, "image_size": 8, "patch_size": 4}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=picture, projection_dim=20)).eval()
    else:
        model = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**text, projection_dim=20)).eval()
    model.save_pretrained(tmp_path)
    encoder = text_encoders.create("clip", weights=str(tmp_path), pooled="projection")
    batch = tokenizer(["a ring", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist()[0] == [0, 6, 2, 3, 4, 5, 1]
    got = encoder(["a ring", "a"])
    with torch.no_grad():
        tower = model.text_model(**batch).last_hidden_state
        if whole:
            features = model.get_text_features(**batch)
            features = features if isinstance(features, torch.Tensor) else features.pooler_output
        else:
            features = model(**batch).text_embeds
    assert torch.equal(got.mask, batch.attention_mask.bool())
    torch.testing.assert_close(got.tokens, tower * batch.attention_mask[..., None], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(got.pooled, features, atol=ROUNDING, rtol=0)


def test_tokenizer_folder_beside_the_weights_is_found(tmp_path, tiny):
    """As diffusers repositories lay them out: text_encoder_2 with tokenizer_2."""
    import transformers as hf

    tiny.network.save_pretrained(tmp_path / "text_encoder_2")
    hf.ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer_2")
    encoder = ClipTextEncoder(tmp_path / "text_encoder_2")
    assert encoder.tokenizer(["ring"], 77) == [[117, 108, 113, 106, 1]]


def test_masked_positions_are_zero_and_mixed_batches_equal_single_prompts(tiny):
    batch = tiny(PROMPTS)
    assert batch.mask.sum(1).tolist() == [10, 3, 2]  # words with start and end token
    assert (batch.tokens[~batch.mask] == 0).all()
    for i, prompt in enumerate(PROMPTS):
        alone = tiny([prompt])
        torch.testing.assert_close(batch.tokens[i, batch.mask[i]], alone.tokens[0], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(batch.pooled[i], alone.pooled[0], atol=ROUNDING, rtol=0)


def test_padding_length_does_not_change_tokens_or_pooled_vector(tiny):
    short = tiny(["ring"])
    for padding in ("kept", "attended"):
        long = ClipTextEncoder(size="tiny", padding=padding)(["ring"])
        assert long.tokens.shape == (1, 77, 64)
        assert long.mask.all()
        torch.testing.assert_close(long.tokens[:, :3], short.tokens, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(long.pooled, short.pooled, atol=ROUNDING, rtol=0)


def test_pooled_choices():
    eos, projected, none = (ClipTextEncoder(pooled=p) for p in ("eos", "projection", None))
    assert (eos.pooled_dim, projected.pooled_dim, none.pooled_dim) == (64, 48, None)
    assert none(["ring"]).pooled is None
    out = projected(["ring"])
    expected = out.tokens[:, -1] @ projected.network.text_projection.weight.T
    torch.testing.assert_close(out.pooled, expected, atol=ROUNDING, rtol=0)
    out = eos(["ring"])
    torch.testing.assert_close(out.pooled, out.tokens[:, -1], atol=0, rtol=0)


def test_a_special_token_spelled_out_does_not_end_the_prompt(tiny):
    out = tiny(["a <end_of_text> ring"])
    assert out.mask.sum() > tiny(["a"]).mask.sum() + 1
    torch.testing.assert_close(out.pooled, out.tokens[:, -1], atol=0, rtol=0)


def test_fp16_and_bf16_answer_in_float32(tiny):
    high = tiny(PROMPTS)
    for dtype in ("fp16", "bf16"):
        low = ClipTextEncoder(size="tiny", dtype=dtype)(PROMPTS)
        assert low.tokens.dtype == low.pooled.dtype == torch.float32
        error = (low.tokens - high.tokens)[high.mask].square().mean().sqrt()
        assert 0 < error < 0.05  # bfloat16 keeps 8 bits of values of order 1


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "pooled", "name"),
    [
        ("vit-l-14", "eos", "clip_vit_l_14_text"),
        ("vit-bigg-14", "projection", "clip_vit_bigg_14_text_transformers"),
    ],
)
def test_named_sizes_are_the_published_networks(published_keys, size, pooled, name):
    def bare(keys):
        return {key.removeprefix("text_model."): shape for key, shape in keys.items()}

    keys, optional = published_keys(name)
    with torch.device("meta"):
        encoder = ClipTextEncoder(size=size, pooled=pooled)
    shapes = bare({key: tuple(value.shape) for key, value in encoder.network.state_dict().items()})
    assert {
        key: shape for key, shape in bare(keys).items() if key not in bare(dict.fromkeys(optional))
    } == shapes


def test_not_finite_weights_are_an_error():
    encoder = ClipTextEncoder(pooled="projection")
    with torch.no_grad():
        encoder.network.text_projection.weight[0, 0] = torch.nan
    with pytest.raises(KitError, match="'clip' in float32 gives values that are not finite at the output"):
        encoder(["ring"])


def test_projection_that_weights_lack(reference, tmp_path):
    folder = reference("clip_l_text_transformers").folder(tmp_path, model_type="clip_text_model")
    with pytest.raises(KitError, match=r"missing text_projection\.weight"):
        ClipTextEncoder(folder, pooled="projection")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "vit-l14"}, r"unknown clip size 'vit-l14'; did you mean 'vit-l-14'\?"),
        ({"size": {"hiden_size": 3}}, r"no field 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"pooled": "eot"}, r"unknown pooled vector 'eot'; did you mean 'eos'\?"),
        ({"max_length": 78}, "max_length is 78; the tower has 77 positions"),
        ({"max_length": 1}, "max_length is 1; the tower has 77 positions, two of them"),
        ({"tokenizer": "/no/such/folder"}, "do not exist"),
        ({"weights": "/no/such/folder"}, "do not exist"),
    ],
)
def test_bad_options_are_one_plain_line(options, message):
    with pytest.raises(KitError, match=message) as caught:
        text_encoders.create("clip", **options)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_weights_are_one_plain_line(reference, tmp_path, tiny):
    tiny.network.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tiny.network.save_pretrained(tmp_path / "shape")
    weights = load_file(tmp_path / "shape" / "model.safetensors")
    key = next(key for key in weights if "final_layer_norm.bias" in key)
    save_file({**weights, key: torch.ones(3)}, tmp_path / "shape" / "model.safetensors", {"format": "pt"})
    t5 = reference("t5_encoder_transformers").folder(tmp_path / "t5", model_type="t5")
    for folder, message in {
        tmp_path / "cut": "cannot be read",
        tmp_path / "shape": r"final_layer_norm.bias is \(3,\) instead of \(64,\)",
        t5: "hold a 't5' network; text encoder 'clip' reads CLIP text towers",
    }.items():
        with pytest.raises(KitError, match=message) as caught:
            ClipTextEncoder(folder)
        assert "\n" not in str(caught.value)

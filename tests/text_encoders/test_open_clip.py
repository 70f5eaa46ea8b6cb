"""open_clip text towers: recorded and live references, every source of weights, padding."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagen_kit import text_encoders
from imagen_kit.errors import KitError
from imagen_kit.text_encoders.open_clip import OpenClipTextEncoder

PROMPTS = ["a large red star on a white background", "ring", ""]
# Sums run in another order when a batch is padded or split: some float32 rounding of values of order 1.
ROUNDING = 5e-6
LENGTHS = [16, 6, 9]  # of the recorded prompts
TOWERS = ["open_clip_text", "open_clip_custom_text"]


@pytest.fixture(scope="module")
def tiny() -> OpenClipTextEncoder:
    return OpenClipTextEncoder(size="tiny", cache=0)


@pytest.fixture
def folder(reference, tmp_path):
    """A folder as open_clip's hub repositories have it."""

    def make(name):
        recorded = reference(name)
        config = {key: value for key, value in recorded.config.items() if key != "_class"}
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": {}})
        )
        save_file(recorded.weights, tmp_path / "open_clip_model.safetensors")
        return recorded, tmp_path

    return make


@pytest.mark.parity
@pytest.mark.parametrize("name", TOWERS)
def test_equals_recorded_tower(folder, unpadded, name):
    recorded, path = folder(name)
    ids = unpadded(recorded.inputs["text"], LENGTHS)
    rows = list(OpenClipTextEncoder(path)._embed(ids))
    for row, whole, length in zip(rows, recorded.outputs["last_ln_final"], LENGTHS, strict=True):
        torch.testing.assert_close(
            row.tokens, whole[:length], atol=recorded.tolerance("last_ln_final"), rtol=0
        )
    pooled = torch.stack([row.pooled for row in rows])
    expected = recorded.outputs["encode_text"]
    torch.testing.assert_close(pooled, expected, atol=recorded.tolerance("encode_text"), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    ("layer", "final_norm", "output"),
    [
        ("last", True, "last_ln_final"),
        ("last", False, "resblocks.2"),
        ("penultimate", True, "penultimate_ln_final"),
        (-2, False, "resblocks.1"),
        (-3, False, "resblocks.0"),
    ],
)
def test_every_layer_with_attended_padding(folder, unpadded, name, layer, final_norm, output):
    recorded, path = folder(name)
    encoder = OpenClipTextEncoder(path, layer=layer, final_norm=final_norm, padding="attended", pooled="eos")
    rows = list(encoder._embed(unpadded(recorded.inputs["text"], LENGTHS)))
    got = torch.stack([row.tokens for row in rows])
    torch.testing.assert_close(got, recorded.outputs[output], atol=recorded.tolerance(output), rtol=0)
    ends = recorded.outputs["last_ln_final"][torch.arange(3), torch.tensor(LENGTHS) - 1]
    pooled = torch.stack([row.pooled for row in rows])
    torch.testing.assert_close(pooled, ends, atol=recorded.tolerance("last_ln_final"), rtol=0)


@pytest.mark.parity
def test_prompts_equal_live_open_clip():
    """Tokenizer, tower and pooling together, on the shipped vocabulary."""
    import open_clip

    encoder = OpenClipTextEncoder(size={"embed_dim": 24, "text_cfg": {"width": 32, "heads": 4, "layers": 2}})
    prompts = ["A photo of a Red  star &amp; a ring!", "ring", "x" * 40 + " word" * 100]
    ids = open_clip.tokenize(prompts)
    got = encoder(prompts)
    assert got.mask.sum(1).tolist() == (ids.argmax(1) + 1).tolist()
    with torch.no_grad():
        features = encoder.network(ids)
    torch.testing.assert_close(got.pooled, features, atol=ROUNDING, rtol=0)


def test_masked_positions_are_zero_and_mixed_batches_equal_single_prompts(tiny):
    batch = tiny(PROMPTS)
    assert batch.mask.sum(1).tolist() == [10, 3, 2]
    assert (batch.tokens[~batch.mask] == 0).all()
    for i, prompt in enumerate(PROMPTS):
        alone = tiny([prompt])
        torch.testing.assert_close(batch.tokens[i, batch.mask[i]], alone.tokens[0], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(batch.pooled[i], alone.pooled[0], atol=ROUNDING, rtol=0)
    long = OpenClipTextEncoder(size="tiny", padding="kept")(["ring"])
    torch.testing.assert_close(long.tokens[:, :3], tiny(["ring"]).tokens, atol=ROUNDING, rtol=0)


@pytest.mark.parity
def test_vit_h_is_the_published_network(published_keys):
    keys, _ = published_keys("openclip_vit_h_14_text")
    with torch.device("meta"):
        encoder = OpenClipTextEncoder(size="ViT-H-14", dtype="fp32")
    shapes = {key: tuple(value.shape) for key, value in encoder.network.state_dict().items()}
    assert shapes == {key: shape for key, shape in keys.items() if key != "logit_scale"}
    assert (encoder.dim, encoder.pooled_dim, encoder.max_length) == (1024, 1024, 77)


def test_one_file_needs_its_size_and_pickles_load_like_safetensors(folder, unpadded):
    recorded, path = folder("open_clip_text")
    file = path / "open_clip_model.safetensors"
    with pytest.raises(KitError, match="are one file; name their architecture with 'size'"):
        OpenClipTextEncoder(file)
    config = {key: recorded.config[key] for key in ("embed_dim", "text_cfg")}
    one = OpenClipTextEncoder(file, size=config)
    old = path / "open_clip_pytorch_model.bin"
    torch.save({"state_dict": {f"module.{key}": value for key, value in recorded.weights.items()}}, old)
    two = OpenClipTextEncoder(old, size=config)
    for key, value in one.network.state_dict().items():
        assert torch.equal(value, two.network.state_dict()[key])
        assert torch.equal(value, recorded.weights[key])


def test_damaged_weights_are_one_plain_line(folder, tmp_path):
    _, path = folder("open_clip_custom_text")
    file = path / "open_clip_model.safetensors"
    whole = file.read_bytes()

    def fails(message):
        with pytest.raises(KitError, match=message) as caught:
            OpenClipTextEncoder(path)
        assert "\n" not in str(caught.value)

    file.write_bytes(whole[:-1000])
    fails("is not a whole safetensors file")
    file.write_bytes(whole)
    weights = load_file(file)
    del weights["text.ln_final.bias"]
    save_file({**weights, "text.more": torch.ones(1), "text.text_projection": torch.ones(2, 3)}, file)
    fails(r"missing ln_final.bias; extra more; text_projection is \(2, 3\) instead of \(32, 24\)")
    file.write_bytes(whole)
    (path / "open_clip_config.json").write_text("[1")
    fails("is not a JSON object")
    (path / "open_clip_config.json").unlink()
    fails("has no open_clip_config.json; name the architecture")
    file.unlink()
    fails("hold none of open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text("{}")
    old = path / "open_clip_pytorch_model.bin"
    old.write_bytes(b"rubbish")
    fails("cannot be read as a checkpoint")
    torch.save([1, 2], old)
    fails("holds a list, not a dictionary of tensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "ViT-H14"}, r"unknown open_clip size 'ViT-H14'; did you mean 'ViT-H-14'\?"),
        ({"size": {"text_cfg": {"widht": 3}}}, r"text_cfg field 'widht'; did you mean 'width'\?"),
        ({"size": "ViT-B-16-SigLIP"}, "not a causal transformer over CLIP's own vocabulary"),
        ({"size": "roberta-ViT-B-32"}, "not a causal transformer"),
        (
            {"size": "ViT-H-14", "weights": "laion2b"},
            r"ViT-H-14 tag 'laion2b'; did you mean 'laion2b_s32b_b79k'\?",
        ),
        ({"weights": "laion2b_s32b_b79k"}, "a pretrained tag needs the model's name in 'size'"),
        ({"weights": "/no/such/folder"}, "do not exist"),
        ({"pooled": "first"}, "unknown pooled vector 'first'"),
        ({"max_length": 100}, "max_length is 100; the tower has 77 positions"),
    ],
)
def test_bad_options_are_one_plain_line(options, message):
    with pytest.raises(KitError, match=message) as caught:
        text_encoders.create("open_clip", **options)
    assert "\n" not in str(caught.value)


def test_not_finite_weights_are_an_error_that_names_the_block(tiny):
    encoder = OpenClipTextEncoder(size="tiny")
    with torch.no_grad():
        encoder.network.transformer.resblocks[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(KitError, match="not finite from block 1 on"):
        encoder(["ring"])

"""What all text encoders promise: encoded once, frozen, same answer in any context, light to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from imagen_kit import text_encoders
from imagen_kit.errors import KitError

OPTIONS = {
    "t5": {"size": "tiny"},
    "clip": {"size": "tiny"},
    "open_clip": {"size": "tiny"},
    "concat": {"encoders": [{"name": "t5", "size": "tiny"}, {"name": "clip", "size": "tiny"}]},
    "precomputed": None,  # needs a file, made below
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def make(name, **more):
        if name != "precomputed":
            return text_encoders.create(name, **OPTIONS[name], **more)
        from imagen_kit.text_encoders import precomputed

        file = tmp_path_factory.mktemp("embeddings") / "file.safetensors"
        precomputed.write(file, text_encoders.create("clip"), ["a", "b", "c", "ring"])
        return text_encoders.create("precomputed", file=file, **more)

    return make


def watched(encoder, calls):
    """Count the prompts that reach the encoder's own work."""
    inner = encoder._encode

    def counting(prompts):
        calls.extend(prompts)
        return inner(prompts)

    encoder._encode = counting
    return encoder


def test_every_registered_encoder_is_tested_here():
    assert text_encoders.names() == sorted(OPTIONS), "add a row to OPTIONS for the new text encoder"


@pytest.mark.parametrize("name", OPTIONS)
def test_shapes_dims_and_freezing(build, name):
    encoder = build(name)
    out = encoder(["ring", "a", ""])
    b, n, d = out.tokens.shape
    assert (b, d) == (3, encoder.dim)
    assert n <= encoder.max_length
    assert out.mask.dtype == torch.bool
    assert out.mask.shape == (3, n)
    assert out.mask.any(1).all()
    assert out.mask.sum(1).max() == n
    assert out.tokens.dtype == torch.float32
    assert (out.tokens[~out.mask] == 0).all()
    assert (None if out.pooled is None else out.pooled.shape) == (
        None if encoder.pooled_dim is None else (3, encoder.pooled_dim)
    )
    assert not out.tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.train().modules())
    wide = build(name, pad_to_max=True)(["ring", "a", ""])
    assert wide.tokens.shape == (3, encoder.max_length, d)
    assert torch.equal(wide.tokens[:, :n], out.tokens)
    assert not wide.mask[:, n:].any()
    assert (wide.tokens[:, n:] == 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_order_and_repetition_of_prompts(build, name):
    encoder = build(name)
    once = encoder(["ring", "a", "b"])
    out = encoder(["b", "ring", "ring", "a"])
    assert torch.equal(out.tokens, once.tokens[[2, 0, 0, 1]])
    assert torch.equal(out.mask, once.mask[[2, 0, 0, 1]])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "concat"])
def test_a_prompt_is_encoded_once(build, name):
    calls: list[str] = []
    encoder = watched(build(name, cache=3), calls)
    encoder(["a", "b", "a", "a"])
    assert calls == ["a", "b"]
    encoder(["b", "a"])
    assert calls == ["a", "b"]
    encoder(["c", "a"])
    assert calls == ["a", "b", "c"]
    encoder(["ring"])  # the least recently used, b, makes room
    encoder(["a", "c", "ring"])
    assert calls == ["a", "b", "c", "ring"]
    encoder(["b"])
    assert calls == ["a", "b", "c", "ring", "b"]
    off = watched(build(name, cache=0), calls)
    calls.clear()
    off(["a", "a"])
    off(["a"])
    assert calls == ["a", "a"]


def test_a_prompt_reaches_the_network_once_and_concat_does_not_repeat_it():
    runs: list[int] = []
    encoder = text_encoders.create(
        "concat", encoders=[{"name": "t5", "size": "tiny"}, {"name": "t5", "size": "tiny"}]
    )
    for part in encoder.parts:
        part.network.register_forward_hook(lambda module, args, out: runs.append(1))
    for _ in range(3):
        encoder(["ring", "a", "ring"])
    assert len(runs) == 2  # one batch in each of the two networks


def test_many_prompts_in_batches_keep_their_order():
    encoder = text_encoders.create("t5", size="tiny", cache=0)
    prompts = ["x" * (i * 7 % 23) + str(i) for i in range(70)]
    out = encoder(prompts)
    assert out.mask.sum(1).tolist() == [len(p) + 1 for p in prompts]
    for i in (0, 31, 69):
        alone = encoder([prompts[i]])
        # Sums run in another order in a padded batch: float32 rounding of values of order 1.
        torch.testing.assert_close(out.tokens[i, out.mask[i]], alone.tokens[0], atol=5e-6, rtol=0)


def test_the_same_under_autocast_and_no_inference_tensors():
    encoder = text_encoders.create("t5", size="tiny", cache=0)
    plain = encoder(["ring"])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(["ring"])
    assert torch.equal(plain.tokens, mixed.tokens)
    weight = torch.ones(64, 1, requires_grad=True)
    (plain.tokens @ weight).sum().backward()  # embeddings take part in a network's backward pass
    torch.testing.assert_close(weight.grad[:, 0], plain.tokens.sum((0, 1)))


def test_what_is_remembered_follows_a_change_of_precision_and_survives_a_move():
    calls: list[str] = []
    encoder = watched(text_encoders.create("clip", size="tiny"), calls)
    exact = encoder(["ring"]).tokens
    encoder.to("cpu")
    encoder(["ring"])
    assert calls == ["ring"]
    encoder.to(torch.bfloat16)
    rounded = encoder(["ring"]).tokens
    assert calls == ["ring", "ring"]
    assert not torch.equal(exact, rounded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_on_a_gpu(build, name):
    encoder = build(name)
    here = encoder(["ring", "a"])
    there = encoder.to("cuda")(["ring", "b", "a"])
    assert there.tokens.device.type == there.mask.device.type == "cuda"
    fresh = build(name).to("cuda")(["ring", "a"])
    # Other kernels than on the CPU add in another order: float32 rounding of values of order 1.
    torch.testing.assert_close(fresh.tokens.cpu(), here.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.tokens[[0, 2]].cpu(), here.tokens, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got an empty list of prompts"),
        ("ring", "takes a list of prompts, not one string"),
        (["ring", 3], "prompt 3 is not text"),
        ([None], "prompt None is not text"),
    ],
)
def test_prompts_that_are_no_list_of_texts(prompts, message):
    with pytest.raises(KitError, match=message):
        text_encoders.create("t5", size="tiny")(prompts)


def test_bad_cache():
    with pytest.raises(KitError, match="cache is -1; it must be 0"):
        text_encoders.create("t5", size="tiny", cache=-1)


def test_importing_and_listing_loads_no_model_library():
    heavy = "transformers", "open_clip", "diffusers", "timm", "huggingface_hub"
    code = (
        "import sys; from imagen_kit import text_encoders as t; names = t.names(); "
        "[t.describe(n) for n in names]; "
        f"print([m for m in {heavy!r} if m in sys.modules], len(names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"[] {len(OPTIONS)}"

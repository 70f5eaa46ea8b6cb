"""DiT, KL and text towers against the living libraries, over random configurations."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagen_kit import checkpoints
from imagen_kit.conditioning import Cond

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
LIVE = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def shaken(model, seed=0):
    """The model with weights that are nowhere degenerate: no zeros, no ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def through_a_folder(model, tmp_path):
    """Saved by its own library, loaded by us."""
    model.save_pretrained(tmp_path / "live")
    return checkpoints.load(tmp_path / "live")


def close(got, want):
    # rounding over some tens of layers, in proportion to the values; far below a wrong layer in either precision
    bound = 2e-5 if want.dtype is torch.float32 else 1e-10
    torch.testing.assert_close(got, want, rtol=0, atol=bound * max(1.0, want.abs().max().item()))


@LIVE
@given(
    heads=st.integers(1, 4),
    head=st.sampled_from([4, 12, 16]),
    depth=st.integers(1, 3),
    channels=st.integers(1, 5),
    learned=st.booleans(),
    patch=st.sampled_from([1, 2, 4]),
    side=st.integers(1, 5),
    classes=st.integers(1, 7),
    eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
)
@torch.no_grad()
def test_dit(heads, head, depth, channels, learned, patch, side, classes, eps, tmp_path):
    model = shaken(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=2 * channels if learned else channels,
            num_layers=depth,
            sample_size=side * patch,
            patch_size=patch,
            num_embeds_ada_norm=classes,
            norm_eps=eps,
        )
    )
    ours = through_a_folder(model, tmp_path)
    x = torch.randn(2, channels, side * patch, side * patch)
    t, y = torch.tensor([3.0, 871.0]), torch.tensor([0, classes])
    close(ours(x, t, Cond(labels=y)), model(x, t, y).sample)


@LIVE
@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    channels=st.integers(1, 6),
    quant=st.booleans(),
    attend=st.booleans(),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
)
@torch.no_grad()
def test_kl(widths, blocks, channels, quant, attend, rows, columns, tmp_path):
    model = shaken(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=blocks,
            latent_channels=channels,
            norm_num_groups=2,
            scaling_factor=0.7,
            shift_factor=0.3,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
            mid_block_add_attention=attend,
        )
    )
    # in float64: groups of few numbers, divided by their spread at every layer, magnify float32's rounding
    ours, model = through_a_folder(model, tmp_path).double(), model.double()
    assert (ours.scale, ours.shift) == (0.7, 0.3)
    picture = torch.randn(2, 3, rows * ours.factor, columns * ours.factor, dtype=torch.float64)
    latents = model.encode(picture).latent_dist
    close(ours.encode(picture), 0.7 * (latents.mean - 0.3))
    close(ours.moments(picture)[1], latents.std)
    close(ours.decode(0.7 * (latents.mean - 0.3)), model.decode(latents.mean).sample)


@LIVE
@given(
    gated=st.booleans(),
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    head=st.sampled_from([4, 8]),
    sharded=st.booleans(),
)
@torch.no_grad()
def test_t5(gated, heads, depth, head, sharded, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=head,
        d_ff=24,
        num_layers=depth,
        num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    model = shaken(transformers.T5EncoderModel(config))
    model.save_pretrained(tmp_path / "live", max_shard_size="2KB" if sharded else "1GB")
    ours = checkpoints.load(tmp_path / "live")
    ids = torch.randint(0, 50, (2, 9))
    close(ours.network(ids), model(input_ids=ids).last_hidden_state)
    for old in (tmp_path / "live").iterdir():
        old.unlink()


@LIVE
@given(act=st.sampled_from(["quick_gelu", "gelu"]), heads=st.sampled_from([1, 2, 4]), projected=st.booleans())
@torch.no_grad()
def test_clip(act, heads, projected, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=12,
        hidden_act=act,
        projection_dim=10,
        bos_token_id=58,
        eos_token_id=59,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = shaken(kind(config))
    ours = through_a_folder(model, tmp_path)
    assert json.loads((tmp_path / "live" / "config.json").read_text())["hidden_act"] == act
    ids = torch.randint(0, 58, (2, 9))
    ids[:, -1] = 59
    tokens, pooled = ours._run(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([8, 8]))
    want = model(input_ids=ids)
    close(tokens, want.last_hidden_state)
    close(pooled, want.text_embeds if projected else want.pooler_output)

"""Transformers over text and picture against live diffusers models, tensors and configs written back."""

from __future__ import annotations

import pytest
import torch
from calls_flux import diffusers as flux
from calls_mmdit import diffusers as mmdit
from calls_pixart import diffusers as pixart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagen_kit import checkpoints
from imagen_kit.checkpoints.rules import to_foreign

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def live(kind, config):
    """A diffusers model with every weight random, none of them degenerate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**config).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.2 * noise)
    return model


def judge(kind, config, ours, theirs):
    """Our module from the model's tensors gives its answer; its tensors and config go back as they came.

    Args:
        ours: the loaded module → its answer.
        theirs: a live model → its answer, in the same form.
    """
    model = live(kind, config)
    state = model.state_dict()
    module = checkpoints.from_state_dict(state, config={"_class_name": kind, **config})
    with torch.no_grad():
        want, got = theirs(model), ours(module)
    # both in float32 with sums in another order, and sines of angles up to 1000
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.std()), rtol=0)

    origin = module.checkpoint_origin
    format = checkpoints.get(origin.format)
    back = to_foreign(format.rules(origin.kwargs), module.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    again = getattr(diffusers, kind)(**format.config(origin.kwargs)).eval()
    again.load_state_dict(back)
    with torch.no_grad():
        assert torch.equal(theirs(again), want)
    return module


@few
@given(
    heads=st.integers(1, 3),
    head=st.sampled_from([8, 12]),
    depth=st.integers(1, 3),
    patch=st.sampled_from([1, 2]),
    norm=st.sampled_from([None, "rms_norm"]),
    dual=st.sets(st.integers(0, 2)),
    side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    out=st.sampled_from([3, 5]),
)
def test_sd3(heads, head, depth, patch, norm, dual, side, out):
    config = {
        "sample_size": 4 * patch,
        "patch_size": patch,
        "in_channels": 3,
        "num_layers": depth,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": 14,
        "caption_projection_dim": heads * head,
        "pooled_projection_dim": 9,
        "out_channels": out,
        "pos_embed_max_size": 5,
        "dual_attention_layers": sorted(i for i in dual if i < depth),
        "qk_norm": norm,
    }
    inputs = {
        "hidden_states": rand(2, 3, side[0] * patch, side[1] * patch),
        "encoder_hidden_states": rand(2, 6, 14),
        "pooled_projections": rand(2, 9),
        "timestep": torch.tensor([3.0, 871.0]),
    }
    module = judge(
        "SD3Transformer2DModel",
        config,
        lambda module: mmdit(module, inputs, config, {})["sample"],
        lambda model: model(**inputs).sample,
    )
    assert module.out_channels == out


@few
@given(
    heads=st.integers(1, 3),
    head=st.sampled_from([8, 16]),
    depth=st.integers(1, 2),
    single=st.integers(1, 2),
    guidance=st.booleans(),
    axes=st.sampled_from([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]),
    side=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    out=st.sampled_from([None, 12]),
)
def test_flux(heads, head, depth, single, guidance, axes, side, out):
    config = {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": out,
        "num_layers": depth,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": 14,
        "pooled_projection_dim": 9,
        "guidance_embeds": guidance,
        "axes_dims_rope": [int(part * head) for part in axes],
    }
    rows, columns = (torch.arange(n).float() for n in side)
    inputs = {
        "hidden_states": rand(2, side[0] * side[1], 8),
        "encoder_hidden_states": rand(2, 6, 14),
        "pooled_projections": rand(2, 9),
        "timestep": torch.tensor([0.003, 0.871]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), rows, columns),
        "txt_ids": torch.zeros(6, 3),
    }
    if guidance:
        inputs["guidance"] = torch.tensor([1.0, 3.5])
    judge(
        "FluxTransformer2DModel",
        config,
        lambda module: flux(module, inputs, config, {})["sample"],
        lambda model: model(**inputs).sample,
    )


@few
@given(
    heads=st.integers(1, 3),
    head=st.sampled_from([12, 24]),
    depth=st.integers(1, 3),
    patch=st.sampled_from([1, 2]),
    sizes=st.booleans(),
    learned=st.booleans(),
    scale=st.sampled_from([0.5, 1, 2]),
    side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    old=st.booleans(),
)
def test_pixart(heads, head, depth, patch, sizes, learned, scale, side, old):
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "in_channels": 3,
        "out_channels": 6 if learned else 3,
        "num_layers": depth,
        "cross_attention_dim": heads * head,
        "sample_size": 4 * patch,
        "patch_size": patch,
        "interpolation_scale": scale,
        "use_additional_conditions": sizes,
        "caption_channels": 14,
    }
    inputs = {
        "hidden_states": rand(2, 3, side[0] * patch, side[1] * patch),
        "encoder_hidden_states": rand(2, 6, 14),
        "timestep": torch.tensor([3.0, 871.0]),
        "encoder_attention_mask": (torch.arange(6)[None] < torch.tensor([[6], [3]])).float(),
    }
    told = {
        "resolution": torch.tensor([[512.0, 768.0], [64.0, 65.0]]),
        "aspect_ratio": torch.tensor([[0.7], [1.0]]),
    }
    added = told if sizes else {"resolution": None, "aspect_ratio": None}
    module = judge(
        "PixArtTransformer2DModel",
        config,
        lambda module: pixart(module, {**inputs, **(told if sizes else {})}, config, {})["sample_masked"],
        lambda model: model(**inputs, added_cond_kwargs=added).sample,
    )
    # the first folders name a class that DiT's do, too
    format, kwargs = checkpoints.get("pixart_diffusers"), module.checkpoint_origin.kwargs
    state = to_foreign(format.rules(kwargs), module.state_dict())
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    name = "Transformer2DModel" if old else "PixArtTransformer2DModel"
    assert checkpoints.detect(shapes, {"_class_name": name}).format is format

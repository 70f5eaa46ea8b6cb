"""The T5 encoder against the one of transformers, in float64 where rounding hides nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagen_kit.errors import KitError
from imagen_kit.text_encoders.t5_network import T5Network, T5Settings, relative_buckets
from imagen_kit.text_encoders.t5_weights import RandomWeights

SIZES = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["t5", "mt5", "umt5"]),
        "vocab_size": st.just(50),
        "d_model": st.sampled_from([8, 24]),
        "d_kv": st.sampled_from([4, 6]),
        "d_ff": st.sampled_from([16, 20]),
        "num_heads": st.integers(1, 3),
        "num_layers": st.integers(1, 3),
        "relative_attention_num_buckets": st.sampled_from([8, 32]),
        "relative_attention_max_distance": st.sampled_from([16, 128]),
        "layer_norm_epsilon": st.sampled_from([1e-6, 1e-3]),
        "feed_forward_proj": st.sampled_from(["relu", "gated-gelu", "gated-silu", "gelu"]),
    }
)


def pair(size, seed=0):
    """(our network, transformers' network) of the same weights, none of them special."""
    hf = pytest.importorskip("transformers")
    kinds = {
        "t5": (hf.T5Config, hf.T5EncoderModel),
        "mt5": (hf.MT5Config, hf.MT5EncoderModel),
        "umt5": (hf.UMT5Config, hf.UMT5EncoderModel),
    }
    config, model = kinds[size["model_type"]]
    theirs = model(config(**{key: value for key, value in size.items() if key != "model_type"})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    ours = T5Network(T5Settings.of(size, strict=True)).eval()
    state = theirs.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    ours.load_state_dict(state)  # so the names are those of published files
    return ours, theirs


@pytest.mark.parity
@settings(max_examples=25, deadline=None)
@given(size=SIZES, n=st.integers(1, 40), seed=st.integers(0, 9))
@torch.no_grad()
def test_equals_transformers_for_any_sizes(size, n, seed):
    ours, theirs = pair(size, seed)
    ours, theirs = ours.double(), theirs.double()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (3, n), generator=generator)
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n // 2)], [1]])
    want = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    # transformers takes the mean square of its norms in float32 (2⁻²⁴, 6e-8 of it), as ours does, but from
    # outputs that double precision lets differ in their last bits, which may round to another float32.
    close = {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(ours(ids, mask)[mask], want.last_hidden_state[mask], **close)
    for mine, other in zip(ours.outputs(ids, mask), want.hidden_states, strict=True):
        torch.testing.assert_close(mine[mask], other[mask], **close)
    torch.testing.assert_close(ours(ids), theirs(input_ids=ids).last_hidden_state, **close)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rounds_no_more_than_transformers_does(dtype):
    """Distance to the float64 run, over several networks: ours is the reference's at most, but for chance."""
    totals = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        size = {
            "model_type": "t5",
            "vocab_size": 60,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_heads": 4,
            "num_layers": 3,
            "feed_forward_proj": "gated-gelu",
        }
        ours, theirs = pair(size, seed)
        ids = torch.randint(0, 60, (4, 30), generator=torch.Generator().manual_seed(seed))
        low = [m.to(dtype) for m in (ours, theirs)]
        found = [low[0](ids).double(), low[1](input_ids=ids).last_hidden_state.double()]
        exact = ours.double()(ids)  # of the rounded weights: what the arithmetic alone loses
        totals += torch.stack([(x - exact).square().mean() for x in found])
    assert totals[0] < 1.3 * totals[1]  # some 12,000 values in all: their spread is a few per cent


@given(
    n=st.integers(1, 300),
    buckets=st.sampled_from([8, 16, 32, 64]),
    farthest=st.sampled_from([40, 128, 256]),
)
@settings(max_examples=25, deadline=None)
def test_buckets_are_those_of_transformers(n, buckets, farthest):
    hf = pytest.importorskip("transformers.models.t5.modeling_t5")
    place = torch.arange(n)
    want = hf.T5Attention._relative_position_bucket(place[None, :] - place[:, None], True, buckets, farthest)
    assert torch.equal(relative_buckets(n, buckets, farthest, torch.device("cpu")), want)


def tiny(kind="t5", **more):
    size = {"model_type": kind, "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    return T5Network(T5Settings.of({**size, "num_layers": 3, **more}))


def test_random_weights_have_t5s_spreads():
    """Every tensor's spread beside that of transformers' own initialisation, in a network wide enough to tell."""
    hf = pytest.importorskip("transformers")
    size = {"vocab_size": 300, "d_model": 192, "d_kv": 32, "d_ff": 320, "num_heads": 4, "num_layers": 2}
    network = T5Network(T5Settings.of({**size, "feed_forward_proj": "gated-gelu"}))
    source = RandomWeights(network, 0)
    theirs = hf.T5EncoderModel(hf.T5Config(**size, feed_forward_proj="gated-gelu")).state_dict()
    for name in source.shapes:
        mine, want = source.get(name), theirs[name]
        assert mine.shape == want.shape
        if name.endswith("layer_norm.weight"):
            assert torch.equal(mine, want)
        else:  # the spread of a spread of k normal numbers is 1/√(2k); five of both
            slack = 5 * (1 / mine.numel()) ** 0.5
            assert abs(mine.std() / want.std() - 1) < slack, name


def test_random_weights_do_not_depend_on_the_order_they_are_asked_for():
    source = RandomWeights(tiny(), 3)
    names = list(source.shapes)
    forwards = {name: source.get(name) for name in names}
    again = RandomWeights(tiny(), 3)
    assert all(torch.equal(again.get(name), forwards[name]) for name in reversed(names))
    other = RandomWeights(tiny(), 4)
    assert not torch.equal(other.get("shared.weight"), forwards["shared.weight"])
    q, k = (forwards[f"encoder.block.0.layer.0.SelfAttention.{x}.weight"] for x in "qk")
    assert not torch.equal(q / q.std(), k / k.std())


@torch.no_grad()
def test_blocks_after_the_asked_one_are_not_run():
    network, ids = tiny(), torch.arange(6)[None]
    ran = []
    for i, block in enumerate(network.encoder.block):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    out = network(ids, None, 2)
    assert ran == [0, 1]
    torch.testing.assert_close(out, network.encoder.final_layer_norm(network.outputs(ids)[2]), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"feed_forward_proj": "gated-gelo"}, r"unknown t5 feed_forward_proj 'gelo'; did you mean 'gelu'\?"),
        ({"model_type": "bert"}, "unknown t5 model_type 'bert'"),
        ({"dropout_rat": 0.1}, "t5 size has no field 'dropout_rat'"),
    ],
)
def test_settings_refuse_what_they_do_not_know(config, message):
    with pytest.raises(KitError, match=message):
        T5Settings.of(config, strict=True)


def test_settings_take_a_whole_config_json():
    hf = pytest.importorskip("transformers")
    for kind in ("T5", "MT5", "UMT5"):
        config = getattr(hf, f"{kind}Config")().to_dict()
        found = T5Settings.of(config)
        assert vars(found) == {key: config[key] for key in vars(found)}
        assert found == T5Settings.of({"model_type": config["model_type"]})  # the same defaults

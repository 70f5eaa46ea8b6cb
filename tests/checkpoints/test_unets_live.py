"""The published U-Nets against live diffusers models of random configurations, tensors and configs written back."""

from __future__ import annotations

import pytest
import torch
from calls_unets import if_diffusers, stable_diffusion, unet2d
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagen_kit import checkpoints, denoisers
from imagen_kit.checkpoints.formats import Shapes
from imagen_kit.checkpoints.rules import to_foreign, to_ours
from imagen_kit.errors import KitError

diffusers = pytest.importorskip("diffusers")
few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


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


def judge(kind, config, inputs, run):
    """Our module from the model's tensors gives its answer; its tensors and config go back as they came."""
    model = live(kind, config)
    state = model.state_dict()
    module = checkpoints.from_state_dict(state, config={"_class_name": kind, **config})
    call = {key: value for key, value in inputs.items() if key not in ("text_embeds", "time_ids")}
    if "time_ids" in inputs:
        call["added_cond_kwargs"] = {key: inputs[key] for key in ("text_embeds", "time_ids")}
    with torch.no_grad():
        want = model(**call).sample
        got = run(module, inputs, config, {})["sample"]
    # both in float32 with sums in another order: measured 2e-6, in norms over four numbers 2e-5 of the spread
    torch.testing.assert_close(got, want, atol=5e-5 * float(want.std()), rtol=0)

    origin = module.checkpoint_origin
    format = checkpoints.get(origin.format)
    back = to_foreign(format.rules(origin.kwargs), module.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    again = getattr(diffusers, kind)(**format.config(origin.kwargs)).eval()
    again.load_state_dict(back)
    with torch.no_grad():
        assert torch.equal(again(**call).sample, want)
    return module


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(
    widths=st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=3),
    layers=st.integers(1, 2),
    depth=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
    linear=st.booleans(),
    sizes=st.booleans(),
    attended=st.integers(0, 2),
    side=st.tuples(st.integers(5, 13), st.integers(5, 13)),
)
def test_stable_diffusion(widths, layers, depth, heads, linear, sizes, attended, side):
    count = len(widths)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D" if i < attended else "DownBlock2D" for i in range(count)],
        "up_block_types": [
            "UpBlock2D" if i >= attended else "CrossAttnUpBlock2D" for i in reversed(range(count))
        ],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": 12,
        "attention_head_dim": heads,
        "transformer_layers_per_block": depth,
        "norm_num_groups": 4,
        "use_linear_projection": linear,
    }
    inputs = {
        "sample": rand(2, 4, *side),
        "timestep": torch.tensor([3, 801]),
        "encoder_hidden_states": rand(2, 5, 12),
    }
    if sizes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 58,
        }
        inputs |= {"text_embeds": rand(2, 10), "time_ids": rand(2, 6).abs() * 100}
    judge("UNet2DConditionModel", config, inputs, stable_diffusion)


def test_upscaler_whose_cells_hear_the_text_alone():
    """The 4× upscaler: noise levels as labels, a low-resolution picture, no attention among fine cells."""
    config = {
        "in_channels": 7,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "only_cross_attention": [True, True, False],
        "num_class_embeds": 9,
    }
    inputs = {
        "sample": rand(2, 7, 8, 4),
        "timestep": torch.tensor([3, 801]),
        "encoder_hidden_states": rand(2, 5, 12),
        "class_labels": torch.tensor([0, 8]),
    }

    def run(module, inputs, config, meta):
        from imagen_kit.conditioning import Cond

        x, low = inputs["sample"].split([4, 3], dim=1)
        cond = Cond(tokens=inputs["encoder_hidden_states"], labels=inputs["class_labels"], low_res=low)
        return {"sample": module(x, inputs["timestep"], cond)}

    judge("UNet2DConditionModel", config, inputs, run)


@few
@given(
    widths=st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=3),
    layers=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    head_dim=st.sampled_from([2, 4, 8]),
    pool=st.sampled_from([1, 2, 4]),
    second=st.booleans(),
    attended=st.integers(1, 3),
    side=st.tuples(st.integers(2, 4), st.integers(2, 4)),
)
def test_deepfloyd(widths, layers, head_dim, pool, second, attended, side):
    count = len(widths)
    attends = [i >= count - attended for i in range(count)]
    config = {
        "in_channels": 6 if second else 3,
        "out_channels": 6,
        "down_block_types": [
            "SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends
        ],
        "up_block_types": [
            "SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]
        ],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "block_out_channels": widths,
        "layers_per_block": layers[:count],
        "cross_attention_dim": 32,
        "cross_attention_norm": "group_norm",
        "attention_head_dim": head_dim,
        "encoder_hid_dim": 8,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": pool,
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 4,
    }
    inputs = {
        "sample": rand(2, config["in_channels"], *(n * 2 ** (count - 1) for n in side)),
        "timestep": torch.tensor([3, 801]),
        "encoder_hidden_states": rand(2, 5, 8),
    }
    if second:
        config |= {
            "class_embed_type": "timestep",
            "time_embedding_act_fn": "gelu",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1 / 0.7071,
            "mid_block_scale_factor": 1 / 0.7071,
            "only_cross_attention": True,
        }
        inputs["class_labels"] = torch.tensor([0, 137])
    judge("UNet2DConditionModel", config, inputs, if_diffusers)


@few
@given(
    widths=st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=3),
    layers=st.integers(1, 2),
    resample=st.sampled_from(["conv", "residual", "mixed"]),
    head_dim=st.sampled_from([None, 2, 8]),
    pad=st.integers(0, 1),
    sin_first=st.booleans(),
    classes=st.sampled_from([None, 5]),
    attended=st.integers(0, 3),
)
def test_unet2d(widths, layers, resample, head_dim, pad, sin_first, classes, attended):
    attends = [i == attended for i in range(len(widths))]
    residual = resample == "residual"
    resnet = resample != "conv"  # mixed: residual blocks change the side of levels with attention alone
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    )
    config = {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in attends[::-1]],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "resnet_time_scale_shift": "scale_shift" if resnet else "default",
        "attention_head_dim": head_dim,
        "downsample_padding": 1 if residual else pad,  # residual blocks do not pad
        "flip_sin_to_cos": not sin_first,
        "freq_shift": int(sin_first),
        "num_class_embeds": classes,
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
    }
    inputs = {"sample": rand(2, 3, 8, 12), "timestep": torch.tensor([3, 801])}
    if classes:
        inputs["class_labels"] = torch.tensor([0, classes - 1])
    judge("UNet2DModel", config, inputs, unet2d)


TINY = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": [1, 2],
}


@pytest.mark.parametrize("sizes", [False, True], ids=["sd", "sdxl"])
def test_single_file(sizes):
    """A whole system's file with latent-diffusion's names; diffusers' own converter is the judge of the names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {**TINY, "use_linear_projection": sizes}
    if sizes:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 6 * 256 + 10}
        config["addition_time_embed_dim"] = 256
    model = live("UNet2DConditionModel", config)
    module = checkpoints.from_state_dict(model.state_dict(), config=config)
    official = checkpoints.get("sd_official")
    single = to_foreign(official.rules(module.checkpoint_origin.kwargs), module.state_dict())
    single = {f"model.diffusion_model.{key}": value for key, value in single.items()}
    theirs = convert_ldm_unet_checkpoint(single, dict(model.config))
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())

    other = {"cond_stage_model.something": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    back = checkpoints.from_state_dict({**single, **other}, config={"num_head_channels": 32})
    assert back.checkpoint_origin.format == "sd_official"
    assert back.checkpoint_origin.kwargs == module.checkpoint_origin.kwargs
    assert all(torch.equal(back.state_dict()[key], value) for key, value in module.state_dict().items())


def test_attention_names_of_old_files():
    """The published DDPM files still have the names from before diffusers 0.17."""
    config = {
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }
    state = live("UNet2DModel", config).state_dict()
    old = {}
    for key, value in state.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(new, name)
        old[key] = value
    assert old.keys() != state.keys()
    want, got = (checkpoints.from_state_dict(s, config=config).state_dict() for s in (state, old))
    assert all(torch.equal(got[key], want[key]) for key in want)
    # a file without config is taken for what Google published
    arguments = checkpoints.from_state_dict(old).checkpoint_origin.arguments()
    assert arguments == checkpoints.from_state_dict(old, config=config).checkpoint_origin.arguments()


@pytest.mark.parametrize("option", [{"conv_in_kernel": 5}, {"time_cond_proj_dim": 7}, {"act_fn": "mish"}])
def test_options_that_no_published_model_has(option):
    state = live("UNet2DConditionModel", TINY).state_dict()
    with pytest.raises(KitError, match=f"{next(iter(option))} .* is not supported") as error:
        checkpoints.from_state_dict(state, config={**TINY, **option})
    assert "\n" not in str(error.value)


def test_ways_up_and_down_that_differ():
    state = live("UNet2DConditionModel", TINY).state_dict()
    config = {**TINY, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    with pytest.raises(KitError, match="must mirror down_block_types, CrossAttnUpBlock2D, UpBlock2D"):
        checkpoints.from_state_dict(state, config=config)


def test_adm_as_a_diffusers_model():
    """An official ADM, its heads' order put right, is a UNet2DModel of diffusers."""
    from test_fixtures import FOLDER, read

    config, weights, inputs, outputs, _ = read(FOLDER / "guided_adm64_official.safetensors")
    module = checkpoints.from_state_dict(weights, config=config)
    format, kwargs = checkpoints.get("unet2d_diffusers"), module.checkpoint_origin.kwargs
    model = diffusers.UNet2DModel(**format.config(kwargs)).eval()
    model.load_state_dict(to_foreign(format.rules(kwargs), module.state_dict()))
    with torch.no_grad():
        got = model(inputs["x"], inputs["timesteps"], inputs["y"]).sample
    torch.testing.assert_close(got, outputs["forward"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("fixture", "layout", "message"),
    [
        ("guided_superres_official", "unet2d_diffusers", "low-resolution picture"),
        ("guided_superres_official", "if_diffusers", "does not pool its text"),
        ("if_stage2_official", "adm_official", "reads text"),
        ("if_stage2_official", "sd_diffusers", "no spatial transformer"),
    ],
)
def test_networks_that_a_format_cannot_say(fixture, layout, message):
    from test_fixtures import FOLDER, read

    config, weights, *_ = read(FOLDER / f"{fixture}.safetensors")
    module = checkpoints.from_state_dict(weights, config=config)
    with pytest.raises(KitError, match=message):
        checkpoints.get(layout).rules(module.checkpoint_origin.kwargs)


@pytest.mark.parametrize("fixture", ["guided_adm64_official", "if_stage2_official"])
def test_a_tensor_that_is_missing_or_transposed_is_named(fixture):
    """Sizes are read off the shapes, yet whichever tensor is damaged, the error is about that one."""
    from test_fixtures import FOLDER, read

    config, weights, *_ = read(FOLDER / f"{fixture}.safetensors")
    weights = {key: value.to("meta") for key, value in weights.items()}
    for key in list(weights)[::9]:
        damaged = [{k: v for k, v in weights.items() if k != key}]
        if weights[key].ndim > 1 and weights[key].shape[0] != weights[key].shape[1]:
            damaged.append({**weights, key: weights[key].transpose(0, 1)})
        for tensors in damaged:
            with pytest.raises(KitError) as error:
                checkpoints.from_state_dict(tensors, config=config)
            assert key in str(error.value)
            assert "\n" not in str(error.value)


def test_the_upscalers_file_is_told_by_its_tensors():
    """Its labels are told apart from Stable Diffusion 2, whose text is as wide: 8 heads everywhere, not heads of 64."""
    with torch.device("meta"):
        module = diffusers.UNet2DConditionModel(
            in_channels=7,
            block_out_channels=(256, 512, 512, 1024),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            only_cross_attention=(True, True, True, False),
            cross_attention_dim=1024,
            attention_head_dim=8,
            num_class_embeds=1000,
            use_linear_projection=True,
        )
        size = denoisers.create("sd_x4_unet")
    form = checkpoints.get("sd_diffusers")
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    arguments = form.configure(Shapes(shapes), None)
    assert arguments == form.configure(Shapes(shapes), dict(module.config))
    own = {key: tuple(value.shape) for key, value in size.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in to_ours(form.rules(arguments), module.state_dict()).items()} == own
    official = checkpoints.get("sd_official")
    theirs = to_foreign(official.rules(arguments), size.state_dict())
    found = official.configure(Shapes({key: tuple(value.shape) for key, value in theirs.items()}), None)
    for told in (arguments, found):
        kinds = [level["attention"] for level in told["levels"][1:]] + [told["middle"]]
        assert [(kind["heads"], kind["cells"]) for kind in kinds] == [
            (8, False),
            (8, False),
            (8, True),
            (8, True),
        ]
        assert (told["in_channels"], told["low_res_channels"], told["num_classes"]) == (4, 3, 1000)

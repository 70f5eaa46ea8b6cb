"""What is particular to the published U-Nets: sizes, how blocks are chosen, what the networks are told, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from imagen_kit import denoisers, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.adm import ADM
from imagen_kit.denoisers.layers.blocks import AttentionBlock, ResBlock, Style
from imagen_kit.denoisers.layers.embeddings import timestep_embedding
from imagen_kit.denoisers.layers.spatial import SpatialTransformer
from imagen_kit.errors import KitError

# Parameters of the published checkpoints: counted in their key maps; of DDPM and SD 2.1 as their papers and cards
# round them (35.7 M and 114 M; 866 M).
PARAMETERS = {
    "adm_64": 295_904_454,
    "adm_128": 421_529_606,
    "adm_256": 553_838_086,
    "adm_512": 558_997_638,
    "adm_64_to_256": 311_795_910,
    "adm_128_to_512": 308_835_270,
    "if_i_m": 371_605_830,
    "if_i_l": 935_365_830,
    "if_i_xl": 4_304_695_110,
    "sd15_unet": 859_520_964,
    "sdxl_unet": 2_567_463_684,
    "sd_x4_unet": 473_398_020,
}
ROUNDED = {"ddpm_32": 35.7e6, "ddpm_256": 114e6, "sd21_unet": 866e6, "if_ii_l": 1.2e9}

LEVELS = [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": {"head_dim": 8}}]
STYLE = {"resample": "residual", "groups": 4}


def random_(module, seed=0):
    """The module with every weight random and large enough to be seen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 1.0 + 0.1 * noise)
    return module.eval()


def parameters(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in denoisers.create(name, **options).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_size(name):
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_size_as_published(name):
    assert parameters(name) == pytest.approx(ROUNDED[name], rel=0.015)


def test_unconditional_size():
    assert parameters("adm_256", num_classes=None) == 552_814_086


@pytest.mark.parametrize("name", [*PARAMETERS, *ROUNDED])
def test_sampling_defaults_name_parts_that_exist(name):
    facts = denoisers.describe(name)["sampling"]
    schedule = schedules.create(**facts["schedule"])
    assert schedule.time_scale == 1.0
    assert facts["prediction"] in ("eps", "v")
    assert facts["sampler"] in samplers.names()
    assert facts["steps"] >= 50


def test_each_level_has_its_own_attention():
    levels = [
        {"channels": 16, "blocks": 1, "attention": {"kind": "transformer", "heads": 2, "depth": 3}},
        {"channels": 16, "blocks": 1},
        {"channels": 16, "blocks": 1, "attention": {"heads": 4}},
    ]
    net = ADM(levels=levels, style={**STYLE, "resample": "conv"}, context_dim=6, middle=False)
    kinds = [[type(unit.attention) for unit in units] for units in (*net.down, *net.up)]
    one, two, none = [SpatialTransformer], [AttentionBlock], [type(None)]
    assert kinds == [one, none, two, two * 2, none * 2, one * 2]
    assert len(net.down[0][0].attention.transformer_blocks) == 3
    assert net.down[2][0].attention.head_dim == 4
    assert net.middle.attention is None


def test_a_level_may_leave_in_its_own_way():
    levels = [{**LEVELS[0], "resample": "residual"}, {"channels": 24, "blocks": 1}, LEVELS[1]]
    net = random_(ADM(levels=levels, style={**STYLE, "resample": "conv"}))
    assert isinstance(net.shrink[0], ResBlock)
    assert not isinstance(net.shrink[1], ResBlock)
    assert [isinstance(grow, ResBlock) for grow in net.grow] == [False, False]
    assert net(torch.randn(1, 3, 8, 12), torch.zeros(1)).shape == (1, 3, 8, 12)


@pytest.mark.parametrize("resample", ["conv", "asymmetric"])
def test_odd_sides(resample):
    """Levels of a picture of 13 have 13, 7 (or 6) and 4 (3): the way up goes to what the way down left."""
    levels = [LEVELS[0], LEVELS[0], LEVELS[1]]
    net = random_(ADM(levels=levels, style={**STYLE, "resample": resample}))
    sides = []
    for units in net.down:
        units[-1].register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[-2:])))
    x = torch.randn(2, 3, 13, 5)
    assert net(x, torch.zeros(2)).shape == x.shape
    assert sides == ([(13, 5), (7, 3), (4, 2)] if resample == "conv" else [(13, 5), (6, 2), (3, 1)])


def test_residual_block_resamples_both_branches():
    block = random_(ResBlock(8, 8, 4, style=Style(groups=2), resample="down"))
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x, emb = torch.randn(1, 8, 6, 4), torch.randn(1, 4)
    torch.testing.assert_close(block(x, emb), F.avg_pool2d(x, 2))
    block.resample = "up"
    torch.testing.assert_close(block(x, emb), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_skip_scale():
    plain = random_(ResBlock(8, 12, 4, style=Style(groups=2)))
    scaled = ResBlock(8, 12, 4, style=Style(groups=2, skip_scale=0.7071))
    scaled.load_state_dict(plain.state_dict())
    x, emb = torch.randn(1, 8, 4, 4), torch.randn(1, 4)
    torch.testing.assert_close(scaled(x, emb), plain(x, emb) * 0.7071)


def test_sines_first():
    t = torch.tensor([0.5, 700.0])
    cos, sin = timestep_embedding(t, 8, shift=1.0).chunk(2, dim=1)
    assert torch.equal(timestep_embedding(t, 8, shift=1.0, sin_first=True), torch.cat([sin, cos], dim=1))
    # frequencies from 1 to 1/10000, both ends included
    torch.testing.assert_close(sin, torch.sin(t[:, None] * 10_000.0 ** -(torch.arange(4) / 3)))


def test_text_statistics_run_over_the_tokens():
    """IF's GroupNorm of the text: one mean and variance for a group of channels of all tokens."""
    block = random_(
        AttentionBlock(8, 4, 6, 0, places=False, context_norm=torch.nn.GroupNorm(2, 6), cells=False)
    )
    text, x = torch.randn(1, 5, 6), torch.randn(1, 8, 2, 2)
    groups = text.reshape(1, 5, 2, 3)
    mean, var = groups.mean((1, 3), keepdim=True), groups.var((1, 3), keepdim=True, correction=0)
    normed = ((groups - mean) / (var + 1e-5).sqrt()).reshape(1, 5, 6)
    want_norm = block.context_norm
    block_norm = normed * want_norm.weight + want_norm.bias
    want = block(x, text)
    block.context_norm = None
    torch.testing.assert_close(block(x, block_norm), want, atol=1e-5, rtol=0)


def test_cells_that_hear_the_text_alone():
    """Without keys of cells every cell is answered from the text; the cells enter as queries alone."""
    block = random_(AttentionBlock(8, 4, 6, 0, places=False, cells=False))
    x, text = (
        torch.randn(2, 8, 2, 3),
        torch.randn(2, 1, 6),
    )  # one token: the answer cannot depend on the query
    heard = block(x, text) - x
    torch.testing.assert_close(heard, heard[:, :, :1, :1].expand_as(heard))
    masked = block(x, torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(masked - x, block.out.bias[:, None, None].expand_as(x), atol=1e-6, rtol=0)


def micro(**options):
    embedding = {"size_numbers": 6, "size_width": 4}
    levels = [LEVELS[0], {**LEVELS[1], "attention": {"kind": "transformer", "heads": 2}}]
    style = {"modulation": "shift", "resample": "conv", "groups": 4}
    return random_(ADM(3, None, levels, None, style, embedding, context_dim=5, pooled_dim=7, **options))


def told(**parts):
    g = torch.Generator().manual_seed(0)
    tokens, pooled = torch.randn(2, 4, 5, generator=g), torch.randn(2, 7, generator=g)
    return Cond(**{"tokens": tokens, "pooled": pooled, "size": torch.full((2, 6), 64.0), **parts})


def test_every_size_number_is_told():
    net, x, t = micro(), torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    want = net(x, t, told())
    for i in range(6):
        size = told().size.clone()
        size[:, i] = 9.0
        assert (net(x, t, told(size=size)) - want).abs().max() > 1e-2
    assert (net(x, t, told(pooled=-told().pooled)) - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    "parts", [{"size": None}, {"size": torch.zeros(2, 5)}, {"pooled": None}, {"pooled": torch.zeros(2, 6)}]
)
def test_sizes_that_are_missing(parts):
    with pytest.raises(KitError, match=r"cond\.size|pooled") as error:
        micro()(torch.randn(2, 3, 8, 8), torch.zeros(2), told(**parts))
    assert "\n" not in str(error.value)


def test_text_pooled_from_other_tokens():
    embedding = {"text_width": 32, "text_heads": 2}
    net = random_(ADM(3, None, LEVELS, None, STYLE, embedding, context_dim=8))
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([10.0, 500.0])
    text, other = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        want = net(x, t, Cond(tokens=text))
        same = net(x, t, Cond(tokens=text, pooled=net.text_pool(text)))
        torch.testing.assert_close(same, want)
        assert (net(x, t, Cond(tokens=text, pooled=net.text_pool(other))) - want).abs().max() > 1e-2
        with pytest.raises(KitError, match="pools its text itself"):
            net(x, t, Cond(tokens=text, pooled=torch.zeros(2, 8)))


def test_super_resolution_that_is_not_told_a_level():
    net = random_(ADM(levels=LEVELS, style=STYLE, embedding={"low_res_noised": False}, low_res_channels=3))
    x, t = torch.randn(1, 3, 4, 4), torch.zeros(1)
    assert net(x, t, Cond(low_res=x)).shape == x.shape
    with pytest.raises(KitError, match="give it low_res in cond"):
        net(x, t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "at least one level"),
        ({"levels": [{"chanels": 32}]}, "takes channels, blocks, attention, dropout, resample"),
        ({"levels": [{"channels": 32, "attention": {"head_dim": 24}}]}, "head_dim 24 must divide it"),
        ({"levels": [{"channels": 32, "attention": {"heads": 5}}]}, "5 heads must divide them"),
        ({"levels": [{"channels": 32, "attention": {}}]}, "give either heads or head_dim"),
        ({"levels": [{"channels": 32, "attention": {"kind": "plane", "heads": 1}}]}, "did you mean 'plain'?"),
        (
            {"levels": [{"channels": 32, "attention": {"kind": "transformer", "heads": 1}}]},
            "give context_dim",
        ),
        ({"levels": [{"channels": 32, "resample": "residuals"}]}, "did you mean 'residual'?"),
        ({"levels": [{"channels": 48}]}, "norm groups 32 must divide them"),
        ({"style": {"activation": "silo"}}, "did you mean 'silu'?"),
        ({"style": {"modulaton": "shift"}}, "takes activation, modulation"),
        ({"embedding": {"text_width": 64}}, "give context_dim too"),
        ({"embedding": {"text_width": 40}, "context_dim": 8}, "multiple of 32"),
        ({"embedding": {"text_width": 32, "text_heads": 3}, "context_dim": 8}, "3 heads must divide it"),
        ({"embedding": {"size_numbers": 6}}, "give pooled_dim too"),
        ({"runtime": {"checkpoint": True}}, "choose from checkpointing, channels_last"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(KitError) as error:
        ADM(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ours_takes_no_other_attention():
    with pytest.raises(KitError, match="must be true or false"):
        denoisers.create("unet", levels=[{"channels": 32, "attention": {"heads": 4}}])


@pytest.mark.parametrize(
    ("name", "x", "told", "tera"),
    [
        ("sd15_unet", (1, 4, 64, 64), {"tokens": (1, 77, 768)}, 0.803),
        ("sdxl_unet", (1, 4, 128, 128), {"tokens": (1, 77, 2048), "pooled": (1, 1280), "size": (1, 6)}, 6.76),
        ("if_i_xl", (1, 3, 64, 64), {"tokens": (1, 77, 4096)}, 2.88),
    ],
)
def test_cost_of_one_evaluation(name, x, told, tera):
    """Floating point operations, two to a multiplication and addition, as counted on the reference classes."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        cond = Cond(**{key: torch.empty(shape) for key, shape in told.items()})
        denoisers.create(name).eval()(torch.empty(x), torch.empty(1), cond)
    assert counter.get_total_flops() / 1e12 == pytest.approx(tera, rel=2e-3)

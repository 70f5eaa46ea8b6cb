from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from imagen_kit import Pipeline, Stage, guidance, samplers, schedules
from imagen_kit.cascade import augment_low_res, resize
from imagen_kit.conditioning import TextEmbeddings
from imagen_kit.errors import KitError
from imagen_kit.pipeline import derive_seed


class Letters(nn.Module):
    """Text encoder: one random vector a byte; padded to the longest prompt of the call."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(
            256, 8, _weight=torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        )
        self.calls: list[list[str]] = []

    def forward(self, prompts):
        self.calls.append(list(prompts))
        longest = max(len(p.encode()) for p in prompts) + 1
        ids = torch.tensor([list(p.encode()) + [0] * (longest - len(p.encode())) for p in prompts])
        mask = torch.arange(longest) <= torch.tensor([[len(p.encode())] for p in prompts])
        tokens = self.table(ids) * mask[..., None]
        return TextEmbeddings(tokens, mask, tokens.sum(1))


class Tiny(nn.Module):
    """Denoiser: a convolution of x and the low-res picture, shifted by mean token, time and level."""

    def __init__(self, seed: int, low_res: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Conv2d(6 if low_res else 3, 3, 3, padding=1)
        self.text = nn.Linear(8, 3)
        for p in self.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
        self.drop = nn.Dropout(0.5)
        self.low_res = low_res
        self.seen: list = []

    def forward(self, x, t, cond):
        self.seen.append((x, t, cond))
        words = cond.tokens.sum(1) / cond.mask.sum(1, keepdim=True)
        shift = self.text(words) + (0.1 * t[:, None]).to(x.dtype)
        if self.low_res:
            x = torch.cat([x, cond.low_res], 1)
            shift = shift + cond.low_res_level[:, None].to(x.dtype)
        return self.drop(self.mix(x)) + shift[:, :, None, None]

    @property
    def sizes(self):
        return [len(x) for x, _, _ in self.seen]


def base(**options) -> Stage:
    settings = {
        "name": "base",
        "denoiser": Tiny(1),
        "schedule": schedules.create("flow"),
        "prediction": "flow",
        "sampler": samplers.create("dpmpp_2m"),
        "size": 4,
        "steps": 3,
        "guidance": (guidance.create("cfg", scale=2.0),),
    }
    return Stage(**{**settings, **options})


def upscaler(**options) -> Stage:
    settings = {
        "name": "sr",
        "denoiser": Tiny(2, low_res=True),
        "schedule": schedules.create("cosine"),
        "prediction": "v",
        "sampler": samplers.create("ddim"),
        "size": 8,
        "steps": 2,
        "guidance": (guidance.create("cfg", scale=1.5), guidance.create("dynamic_threshold")),
        "low_res_level": 0.2,
    }
    return Stage(**{**settings, **options})


def cascade() -> Pipeline:
    return Pipeline(Letters(), [base(), upscaler()])


def same(a, b) -> bool:
    # float32: another batch size may add in another order
    return torch.allclose(a, b, atol=2e-6)


def test_a_cascade_gives_pictures_in_range():
    images = cascade()(["a cat", "two dogs"], num=2, seed=5)
    assert images.tensor.shape == (4, 3, 8, 8)
    assert images.tensor.min() >= 0
    assert images.tensor.max() <= 1
    assert images.prompts == ["a cat", "a cat", "two dogs", "two dogs"]
    assert images.seeds == [5, 6, 5, 6]
    assert images.tensor.std() > 0.05  # not flat, so that equality means something below


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    pipeline = cascade()
    one, again, other = (pipeline("a cat", seed=s).tensor for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddpm", "euler_ancestral", "dpmpp_2m_sde", "heun"])
def test_a_picture_depends_neither_on_its_batch_nor_on_its_place(name):
    pipeline = Pipeline(
        Letters(), [base(sampler=samplers.create(name)), upscaler(sampler=samplers.create(name))]
    )
    prompts = ["a cat", "two dogs and a bird", "x"]
    whole = pipeline(prompts, num=2, seed=7).tensor
    for size in (1, 2, 4):
        assert same(pipeline(prompts, num=2, seed=7, batch_size=size).tensor, whole)
    turned = pipeline(prompts[::-1], num=2, seed=7).tensor
    assert same(turned.reshape(3, 2, 3, 8, 8).flip(0), whole.reshape(3, 2, 3, 8, 8))
    assert same(pipeline("two dogs and a bird", seed=8).tensor[0], whole[3])


def test_one_seed_a_prompt():
    pipeline = cascade()
    both = pipeline(["a", "b"], seed=[3, 9])
    assert both.seeds == [3, 9]
    assert same(both.tensor[1], pipeline("b", seed=9).tensor[0])


def test_every_stage_and_seed_has_noise_of_its_own():
    pipeline = Pipeline(Letters(), [base(size=8), upscaler(low_res_level=1.0)])  # low_res is all noise
    pipeline(["a", "a"], seed=[0, 1])
    starts = [stage.denoiser.seen[0][0][:2].flatten(1) for stage in pipeline.stages]
    low_res = pipeline.stages[1].denoiser.seen[0][2].low_res[:2].flatten(1)
    correlations = torch.corrcoef(torch.cat([*starts, low_res])) - torch.eye(6)
    # 192 independent values correlate by 0.07, one standard deviation
    assert correlations.abs().max() < 0.3
    assert len({derive_seed(s, i) for s in range(50) for i in range(3)}) == 150


def test_the_start_has_the_spread_of_the_schedule():
    pipeline = Pipeline(Letters(), [base(schedule=schedules.create("edm"), prediction="edm", size=32)])
    pipeline("a", sampler="euler", steps=1)
    (x, _, _) = pipeline.stages[0].denoiser.seen[0]
    # the network sees x / sqrt(sigma² + 0.25) at sigma = 80; 3072 values: standard error 1.3 %
    assert x[0].std().item() == pytest.approx(1.0, abs=0.05)


def test_low_res_is_the_picture_before_it_noised_by_the_shared_function():
    pipeline = cascade()
    first = Pipeline(pipeline.text_encoder, pipeline.stages[:1])("a cat", seed=4).tensor * 2 - 1
    pipeline("a cat", seed=4)
    cond = pipeline.stages[1].denoiser.seen[-1][2]
    generator = torch.Generator().manual_seed(derive_seed(4, 1))
    torch.randn(3, 8, 8, generator=generator)  # the start comes first
    noise = torch.randn(3, 8, 8, generator=generator)[None]
    expected = augment_low_res(first, 8, 0.2, noise)
    assert same(cond.low_res, expected.repeat(2, 1, 1, 1))  # cond and uncond alike
    assert torch.equal(cond.low_res_level, torch.full((2,), 0.2))
    assert (expected - resize(first, 8)).abs().max() > 0.1


def test_evaluations_and_their_batch_sizes():
    pipeline = cascade()
    pipeline(["a", "b", "c"])
    assert [stage.denoiser.sizes for stage in pipeline.stages] == [[6] * 3, [6] * 2]
    pipeline = cascade()
    pipeline(["a", "b", "c"], guidance={"base": 1.0, "sr": 1}, batch_size=2)
    assert [stage.denoiser.sizes for stage in pipeline.stages] == [[2] * 3 + [1] * 3, [2] * 2 + [1] * 2]


def test_every_text_is_encoded_once_and_only_when_it_is_read():
    pipeline = cascade()
    pipeline(["a", "b", "a"], num=3, negative="b", batch_size=2)
    pipeline(["a", "b", "a"])
    pipeline(["a", "b", "a"], guidance={"base": 1.0, "sr": 1.0})
    assert pipeline.text_encoder.calls == [["a", "b"], ["a", "b", ""], ["a", "b"]]


def test_negative_prompts_take_the_place_of_no_text():
    pipeline = cascade()
    plain = pipeline(["a", "b"]).tensor
    assert torch.equal(pipeline(["a", "b"], negative="").tensor, plain)
    away = pipeline(["a", "b"], negative=["dull", ""]).tensor
    assert (away[0] - plain[0]).abs().max() > 1e-3
    assert same(away[1], plain[1])
    # led away from itself: the difference vanishes, which is scale 1
    alone = pipeline(["a", "b"], guidance={"base": 1.0, "sr": 1.0}).tensor
    assert same(pipeline(["a", "b"], negative=["a", "b"]).tensor, alone)


def test_the_unconditional_prediction_does_not_see_the_text():
    pipeline = cascade()
    unguided = {"base": 0.0, "sr": 0.0}
    assert same(pipeline("a", guidance=unguided).tensor, pipeline("something else", guidance=unguided).tensor)


def test_zeros_stand_for_no_text_when_asked_for():
    pipeline = Pipeline(Letters(), [base()], unconditional="zeros")
    pipeline("a cat")
    cond = pipeline.stages[0].denoiser.seen[0][2]
    assert cond.tokens[0].abs().sum() > 0
    assert cond.tokens[1].abs().sum() == cond.pooled[1].abs().sum() == 0
    assert cond.mask[1].any()  # something to attend to


def test_settings_of_one_call():
    pipeline = cascade()
    pipeline("a", sampler="heun", steps={"base": 2, "sr": 4}, guidance=[guidance.create("cfg", scale=1.0)])
    assert [stage.denoiser.sizes for stage in pipeline.stages] == [[1] * 3, [2] * 4]
    assert pipeline.stages[0].steps == 3  # the pipeline itself is as it was
    given = pipeline("a", sampler={"base": samplers.create("ddim"), "sr": "ddpm"}).tensor
    fresh = Pipeline(
        Letters(), [base(sampler=samplers.create("ddim")), upscaler(sampler=samplers.create("ddpm"))]
    )
    assert torch.equal(given, fresh("a").tensor)


def test_a_number_sets_the_scale_and_keeps_the_rest_of_the_stack():
    stack = (guidance.create("cfg", scale=2.0), guidance.create("static_threshold", limit=0.5))
    pipeline = Pipeline(Letters(), [base(guidance=stack)])
    got = pipeline("a", guidance=6).tensor
    other = Pipeline(Letters(), [base(guidance=(guidance.create("cfg", scale=6.0), stack[1]))])
    assert torch.equal(got, other("a").tensor)
    assert got.max() <= 0.75  # x0 within ±0.5


def test_dropout_is_off_while_sampling_and_as_before_afterwards():
    pipeline = cascade()
    net = pipeline.stages[0].denoiser
    net.train()
    net.mix.eval()
    assert torch.equal(pipeline("a").tensor, pipeline("a").tensor)
    assert (net.training, net.drop.training, net.mix.training) == (True, True, False)
    assert all(p.grad_fn is None for p in [pipeline("a").tensor])


def test_half_precision_denoisers_keep_a_float32_state():
    pipeline = cascade()
    exact = pipeline("a cat").tensor
    pipeline.to(dtype=torch.bfloat16)
    states = []
    rough = pipeline("a cat", callback=lambda stage, step, x, x0: states.append(x.dtype)).tensor
    x, t, cond = pipeline.stages[1].denoiser.seen[-1]
    assert (x.dtype, cond.tokens.dtype, cond.low_res.dtype) == (torch.bfloat16,) * 3
    assert (t.dtype, cond.low_res_level.dtype) == (torch.float32,) * 2
    assert set(states) == {torch.float32}
    # bf16 networks: 8 bits, five evaluations
    assert (rough - exact).abs().max() < 0.1


def test_callback_and_progress(capsys):
    seen = []
    images = cascade()(
        ["a", "b"], batch_size=1, callback=lambda stage, step, x, x0: seen.append((stage, step, x.shape))
    )
    each = [("base", i, (1, 3, 4, 4)) for i in range(3)] + [("sr", i, (1, 3, 8, 8)) for i in range(2)]
    assert seen == 2 * each
    assert capsys.readouterr() == ("", "")
    again = cascade()(["a", "b"], batch_size=1, progress=True)
    assert torch.equal(images.tensor, again.tensor)
    out, err = capsys.readouterr()
    assert (out, "10/10" in err) == ("", True)  # standard output is left to results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ""}, "prompt 1 is empty"),
        ({"prompts": ["a", "  "]}, "prompt 2 is empty"),
        ({"prompts": []}, "no prompt given"),
        ({"prompts": [3]}, "prompt 1 must be a text, got 3"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"num": 0}, "num must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"guidance": "strong"}, "guidance scale must be a number, got 'strong'"),
        ({"guidance": math.nan}, "guidance scale must be a number, got nan"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"prompts": ["a", "b"], "seed": [1, 2, 3]}, "3 values of seed for 2 prompts"),
        ({"prompts": ["a", "b"], "negative": ["x", "y", "z"]}, "3 values of negative for 2 prompts"),
        ({"sampler": "dpmpp2m"}, "unknown sampler 'dpmpp2m'; did you mean 'dpmpp_2m'"),
        ({"sampler": 3}, "unknown sampler '3'"),
        ({"steps": {"bass": 3}}, "unknown stage 'bass'; did you mean 'base'"),
        ({"negative": "x", "guidance": {"base": 1, "sr": 1}}, "give a guidance scale other than 1"),
        (
            {"also": [("x", 2.0)], "guidance": {"base": 1, "sr": ()}},
            "further prompts act through guidance; give a guidance scale other than 1",
        ),
        ({"also": ["fog"]}, r"a further prompt is a pair \(text, weight\), got 'fog'"),
        ({"also": [("fog", "much")]}, "weight of further prompt 1 must be a number"),
        ({"also": [(" ", 1.0)]}, "further prompt 1 is empty"),
        (
            {"prompts": ["a", "b"], "also": [(["x", "y", "z"], 1.0)]},
            "3 values of further prompts for 2 prompts",
        ),
        ({"guidance": guidance.create("autoguidance")}, "Autoguidance needs the network 'weak'; given: none"),
        (
            {"guidance": guidance.create("compose", weights={"fog": 1.0})},
            "Compose needs the conditioning 'fog'",
        ),
        ({"guidance": guidance.create("pag", layers=0)}, "Tiny has no layer marked is_self_attention"),
        (
            {"guidance": guidance.create("cfg_pp"), "sampler": "heun"},
            "cfg_pp needs a sampler with the option renoise, which 'heun' has not; choose from .*ddim",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(options, message):
    pipeline = cascade()
    with pytest.raises(KitError, match=message):
        pipeline(**{"prompts": "a", **options})
    assert pipeline.text_encoder.calls == pipeline.stages[0].denoiser.seen == []


def test_a_sampler_that_does_not_fit_is_told_before_anything_runs():
    terminal = schedules.create("linear", zero_terminal_snr=True)
    pipeline = Pipeline(
        Letters(),
        [base(schedule=terminal, prediction="v", sampler=samplers.create("heun", spacing="trailing"))],
    )
    with pytest.raises(KitError, match="sampler 'heun' does not fit schedule 'linear'"):
        pipeline("a")
    assert pipeline.text_encoder.calls == []


def test_values_that_are_not_finite_name_the_stage():
    pipeline = cascade()
    pipeline.stages[1].denoiser.text.bias.data[0] = math.inf
    with pytest.raises(KitError, match="stage 'sr' gave values that are not finite"):
        pipeline("a")


def test_bad_stages_are_refused():
    with pytest.raises(KitError, match="low_res_level of stage 'sr' must be a number from 0"):
        upscaler(low_res_level=1.5)
    with pytest.raises(KitError, match="steps must be"):
        base(steps=0)
    with pytest.raises(KitError, match="at least one stage"):
        Pipeline(Letters(), [])
    with pytest.raises(KitError, match="names of their own, got base, base"):
        Pipeline(Letters(), [base(), base()])
    with pytest.raises(KitError, match="unknown unconditional embedding 'zero'; did you mean 'zeros'"):
        Pipeline(Letters(), [base()], unconditional="zero")


def test_further_prompts_join_with_their_weights():
    pipeline = cascade()
    plain = pipeline(["a", "b"]).tensor
    # the prompt itself once more: its scale grows from 2 and 1.5 by 0.5
    itself = pipeline(["a", "b"], also=[(["a", "b"], 0.5)]).tensor
    assert same(itself, pipeline(["a", "b"], guidance={"base": 2.5, "sr": 2.0}).tensor)
    pipeline = cascade()
    mixed = pipeline(["a", "b"], also=[("fog", 1.0), ("rain", -0.5)], num=2)
    assert pipeline.text_encoder.calls == [["a", "b", "", "fog", "rain"]]
    assert [stage.denoiser.sizes for stage in pipeline.stages] == [[16] * 3, [16] * 2]
    alone = cascade()("b", also=[("fog", 1.0), ("rain", -0.5)])
    assert same(alone.tensor[0], mixed.tensor[2])
    assert (mixed.tensor[2] - plain[1]).abs().max() > 1e-3


def test_a_stage_without_guidance_stays_without():
    pipeline = Pipeline(Letters(), [base(), upscaler(guidance=())])
    pipeline("a", also=[("fog", 1.0)])
    assert [stage.denoiser.sizes for stage in pipeline.stages] == [[3] * 3, [1] * 2]


def test_guidance_may_name_texts():
    fixed = guidance.create("compose", weights={"text:fog": 1.5})
    pipeline = Pipeline(Letters(), [base(guidance=(guidance.create("cfg", scale=2.0), fixed))])
    got = pipeline(["a", "b"])
    assert pipeline.text_encoder.calls == [["a", "b", "", "fog"]]
    asked = Pipeline(Letters(), [base()])(["a", "b"], also=[("fog", 1.5)])
    assert same(got.tensor, asked.tensor)


def test_perpendicular_negatives_lead_from_no_text():
    strategy = guidance.create("perp_neg", scale=2.0, negatives=["uncond", "text:fog"])
    pipeline = Pipeline(Letters(), [base()])
    none = pipeline("a", guidance=strategy, negative="").tensor
    assert pipeline.text_encoder.calls == [["a", "", "fog"]]
    own = pipeline("a", guidance=guidance.create("perp_neg", scale=2.0), negative="a").tensor
    assert same(own, pipeline("a").tensor)  # parallel to the prompt: there remains CFG
    away = pipeline("a", guidance=strategy, negative="rain").tensor
    assert (away - none).abs().max() > 1e-4


def test_a_weak_network_comes_along():
    weak = Tiny(7)
    strategy = guidance.create("autoguidance", scale=2.0)
    pipeline = Pipeline(Letters(), [base(guidance=(strategy,), networks={"weak": weak})])
    weak.train()
    got = pipeline("a")
    assert torch.equal(got.tensor, pipeline("a").tensor)  # no dropout
    assert (weak.training, weak.sizes) == (True, [1] * 6)
    same_one = Pipeline(Letters(), [base(guidance=(strategy,), networks={"weak": Tiny(1)})])
    unguided = Pipeline(Letters(), [base(guidance=())])("a").tensor
    assert same(same_one("a").tensor, unguided)
    assert not same(got.tensor, unguided)
    assert (
        next(pipeline.to(dtype=torch.bfloat16).stages[0].networks["weak"].parameters()).dtype
        == torch.bfloat16
    )


def test_cfg_pp_sets_the_sampler():
    strategy = guidance.create("cfg_pp", scale=0.6)
    pipeline = Pipeline(Letters(), [base(guidance=(strategy,), sampler=samplers.create("ddim"))])
    given = Pipeline(
        Letters(), [base(guidance=(strategy,), sampler=samplers.create("ddim", renoise="uncond"))]
    )
    assert torch.equal(pipeline("a").tensor, given("a").tensor)
    assert not same(pipeline("a").tensor, pipeline("a", guidance=guidance.create("cfg", scale=0.6)).tensor)
    with pytest.raises(KitError, match=r"cfg_pp scale must be from 0 to 1, got 7\.5"):
        pipeline("a", guidance=7.5)


STACK = (
    guidance.create("cads", noise=1.0),
    guidance.create("apg", scale=3.0, momentum=-0.5, norm=2.0),
    guidance.create("scheduled", of={"name": "cfg_zero", "scale": 2.0}, shape="oscillating", hold=1),
)


@pytest.mark.parametrize("execution", ["batched", "split"])
def test_guidance_with_a_memory_depends_neither_on_batch_nor_place(execution):
    pipeline = Pipeline(Letters(), [base(guidance=STACK), upscaler(guidance=STACK, execution=execution)])
    prompts = ["a cat", "two dogs and a bird", "x"]
    whole = pipeline(prompts, num=2, seed=7).tensor
    for size in (1, 4):
        assert same(pipeline(prompts, num=2, seed=7, batch_size=size).tensor, whole)
    assert same(pipeline("two dogs and a bird", seed=8).tensor[0], whole[3])
    assert not same(
        whole, pipeline(prompts, num=2, seed=7, guidance={"base": STACK[1:], "sr": STACK[1:]}).tensor
    )
    split = Pipeline(Letters(), [base(guidance=STACK, execution="split"), upscaler(guidance=STACK)])
    assert same(split(prompts, num=2, seed=7).tensor, whole)


def test_a_wrong_execution_is_refused():
    with pytest.raises(KitError, match="unknown guidance execution 'splitt'; did you mean 'split'"):
        base(execution="splitt")

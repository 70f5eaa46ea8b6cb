from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.guidance.base import Branch, Guidance
from imagen_kit.prediction import PREDICTIONS, target

FLOW = schedules.create("flow")
LINEAR = schedules.create("linear")
EDM = schedules.create("edm")


class Recorder:
    """A network answering c·x + mean of its conditioning; keeps what it was called with."""

    def __init__(self, channels: int = 1):
        self.calls: list[tuple[torch.Tensor, torch.Tensor, object]] = []
        self.channels = channels

    def __call__(self, x, t, cond=None):
        self.calls.append((x, t, cond))
        shift = 0.0
        if cond is not None:
            tokens = cond.tokens if isinstance(cond, Cond) else cond
            shift = tokens.flatten(1).mean(1).reshape(-1, 1, 1, 1)
        out = 0.3 * x + shift + 0.01 * t.reshape(-1, 1, 1, 1)
        return torch.cat([out * (i + 1) for i in range(self.channels)], 1)

    @property
    def sizes(self) -> list[int]:
        return [len(x) for x, _, _ in self.calls]


def text(batch: int, value: float, length: int = 3) -> Cond:
    return Cond(
        tokens=torch.full((batch, length, 4), value), mask=torch.ones(batch, length, dtype=torch.bool)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("schedule", "t"), [(FLOW, 0.7), (LINEAR, 431.25), (EDM, 3.0)])
def test_a_network_that_answers_its_target_gives_x0(prediction, schedule, t):
    x0, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    alpha, sigma = schedule.alpha_sigma(t)
    answer = target(prediction, x0, noise, alpha, sigma)
    denoise = denoise_fn(lambda x, t: answer, schedule, prediction)
    # float64 coefficients, condition number of the conversion below 1e3
    assert torch.allclose(denoise(alpha * x0 + sigma * noise, t), x0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_tensor_of_times_is_the_same_as_each_time_alone(prediction):
    x, times = torch.randn(3, 2, 4, 4, dtype=torch.float64), [0.2, 0.5, 0.9]
    denoise = denoise_fn(Recorder(), FLOW, prediction)
    alone = torch.cat([denoise(x[i : i + 1], t) for i, t in enumerate(times)])
    together = denoise(x, torch.tensor(times, dtype=torch.float64))
    # the network is told float32 times either way; the coefficients are float64
    assert torch.allclose(together, alone, atol=1e-12)
    assert torch.allclose(denoise(x, torch.tensor(0.5, dtype=torch.float64)), denoise(x, 0.5), atol=1e-12)


@pytest.mark.parametrize(
    "given", [431.0, torch.tensor(431.0), torch.full((2,), 431.0), torch.tensor([431, 431])]
)
def test_the_network_is_told_one_float32_time_a_sample(given):
    net = Recorder()
    denoise_fn(net, LINEAR)(torch.randn(2, 3, 4, 4), given)
    (_, t, cond) = net.calls[0]
    assert (t.dtype, t.tolist(), cond) == (torch.float32, [431.0, 431.0], None)


def test_edm_is_told_the_quarter_log_of_sigma_and_a_scaled_picture():
    net, x = Recorder(), torch.randn(2, 3, 4, 4)
    denoise_fn(net, EDM, "edm", sigma_data=0.7)(x, 2.0)
    scaled, t, _ = net.calls[0]
    # c_in and c_noise of Karras et al. 2022, table 1; float32
    assert torch.allclose(scaled, x / math.sqrt(4 + 0.49), rtol=1e-6)
    assert t.tolist() == pytest.approx([math.log(2) / 4] * 2)


def test_learned_variance_is_left_out():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(denoise_fn(Recorder(2), LINEAR)(x, 500.0), denoise_fn(Recorder(1), LINEAR)(x, 500.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_x_and_the_network_gets_the_asked_one(dtype):
    net, x = Recorder(), torch.randn(2, 3, 4, 4, dtype=dtype)
    assert denoise_fn(net, FLOW, "flow", dtype=torch.bfloat16)(x, 0.5).dtype == dtype
    assert net.calls[0][0].dtype == torch.bfloat16
    denoise_fn(net, FLOW, "flow")(x, 0.5)
    assert net.calls[1][0].dtype == dtype


def test_half_precision_states_are_combined_in_float32():
    x = torch.randn(2, 3, 8, 8)
    answer = torch.randn(2, 3, 8, 8).bfloat16()
    alpha, sigma = LINEAR.alpha_sigma(900.0)  # 1/alpha is 50: bf16 arithmetic would be off by 0.2
    got = denoise_fn(lambda x, t: answer, LINEAR)(x.bfloat16(), 900.0)
    exact = (x.bfloat16().double() - sigma * answer.double()) / alpha
    # one rounding to bf16 (8 bits) at the end, plus float32's
    assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-4)


def test_clip_bounds_x0():
    x = 10 * torch.randn(2, 3, 4, 4)
    free, held = (
        denoise_fn(Recorder(), FLOW, "x0")(x, 0.5),
        denoise_fn(Recorder(), FLOW, "x0", clip=1.0)(x, 0.5),
    )
    assert free.abs().max() > 1
    assert torch.equal(held, free.clamp(-1, 1))


def test_guidance_is_one_call_on_a_double_batch_in_the_order_cond_uncond():
    net, x = Recorder(), torch.randn(2, 3, 4, 4)
    denoise_fn(net, FLOW, "flow", cond=text(2, 1.0), uncond=text(2, -1.0, length=1), guidance=3.0)(x, 0.5)
    assert net.sizes == [4]
    given, t, cond = net.calls[0]
    assert torch.equal(given, torch.cat([x, x]))
    assert t.tolist() == [0.5] * 4
    # the shorter text is padded with masked zeros
    assert cond.tokens[:, 0, 0].tolist() == [1, 1, -1, -1]
    assert cond.mask.sum(1).tolist() == [3, 3, 1, 1]


def test_conditioning_may_be_any_tensor_with_the_batch_in_front():
    net, x = Recorder(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    cond, uncond = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    got = denoise_fn(net, FLOW, "flow", cond=cond, uncond=uncond, guidance=3.0)(x, 0.5)
    parts = [denoise_fn(net, FLOW, "flow", cond=c)(x, 0.5) for c in (cond, uncond)]
    assert torch.allclose(got, 3 * parts[0] - 2 * parts[1], atol=1e-12)  # float64 rounding
    assert net.sizes == [4, 2, 2]


def test_without_cond_the_network_takes_two_arguments():
    x = torch.randn(2, 3, 4, 4)
    assert denoise_fn(lambda x, t: x, FLOW, "x0")(x, 0.5).shape == x.shape


class Weak(Guidance):
    """Autoguidance (Karras et al. 2024), as a later file would hold it."""

    def __init__(self, weak, scale):
        self.scale, self.branch = scale, Branch("weak", "cond", through=lambda main: weak)

    @property
    def needs(self):
        return (self.branch,)

    def apply(self, guided, predictions, step):
        return guided + (self.scale - 1) * (predictions["cond"] - predictions["weak"])


def test_a_strategy_can_bring_its_own_network_and_add_up_with_cfg():
    main, weak, x = Recorder(), Recorder(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    cond, uncond = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def tired(x, t, cond):
        return 0.5 * weak(x, t, cond)

    both = [guidance.create("cfg", scale=3.0), Weak(tired, 2.0)]
    got = denoise_fn(main, FLOW, "x0", cond=cond, uncond=uncond, guidance=both)(x, 0.5)
    assert (main.sizes, weak.sizes) == ([4], [2])
    c, u = main(x, torch.full((2,), 0.5), cond), main(x, torch.full((2,), 0.5), uncond)
    assert torch.allclose(got, c + 2 * (c - u) + (c - 0.5 * c), atol=1e-12)  # float64 rounding


class Away(Guidance):
    """Reads a third conditioning of the main network."""

    needs = (Branch("other", "other"),)

    def apply(self, guided, predictions, step):
        return guided - predictions["other"]


def test_other_conditionings_join_the_same_call():
    net, x = Recorder(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    c, u, o = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    stack = [guidance.create("cfg", scale=2.0), Away()]
    got = denoise_fn(net, FLOW, "x0", cond=c, uncond=u, others={"other": o}, guidance=stack)(x, 0.5)
    assert net.sizes == [6]
    t = torch.full((2,), 0.5)
    assert torch.allclose(got, 2 * net(x, t, c) - net(x, t, u) - net(x, t, o), atol=1e-12)  # float64 rounding


def test_nothing_is_read_back_from_the_device():
    # tensors of the meta device hold no values: any read-back raises
    x = torch.empty(2, 3, 8, 8, device="meta")
    cond, uncond = (torch.empty(2, 5, device="meta") for _ in range(2))
    stack = [
        guidance.create("cfg", scale=3.0, interval=(0.1, 100.0)),
        guidance.create("rescale", space="v"),
        guidance.create("dynamic_threshold"),
        guidance.create("static_threshold"),
    ]
    denoise = denoise_fn(Recorder(), FLOW, "eps", cond=cond, uncond=uncond, guidance=stack)
    assert denoise(x, 0.5).shape == x.shape
    assert denoise(x, torch.empty(2, device="meta")).shape == x.shape
    assert denoise(x.bfloat16(), torch.empty((), device="meta")).dtype == torch.bfloat16


def test_guidance_is_never_dropped_for_want_of_a_conditioning():
    with pytest.raises(KitError, match="CFG needs the conditioning 'uncond'; given: cond"):
        denoise_fn(Recorder(), FLOW, cond=text(2, 1.0), guidance=3.0)
    with pytest.raises(KitError, match="given: none"):
        denoise_fn(Recorder(), FLOW, guidance=3.0)
    with pytest.raises(KitError, match="without 'cond'"):
        denoise_fn(Recorder(), FLOW, uncond=text(2, 1.0))


def test_two_meanings_of_one_name_are_refused():
    class Clash(Away):
        needs = (Branch("uncond", "other"),)

    with pytest.raises(KitError, match="Clash means another prediction by 'uncond'"):
        denoise_fn(
            Recorder(),
            FLOW,
            cond=text(1, 0),
            uncond=text(1, 0),
            others={"other": text(1, 0)},
            guidance=[2.0, Clash()],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'; did you mean 'eps'"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"guidance": "cfg"}, "guidance must be a strategy, a number or a list"),
        ({"guidance": [guidance.create]}, "guidance must be a strategy, a number or a list"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(KitError, match=message):
        denoise_fn(Recorder(), FLOW, **options)


def test_shapes_that_do_not_fit_are_refused():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(KitError, match="'cond' is for 3 samples, but x holds 2"):
        denoise_fn(Recorder(), FLOW, cond=text(3, 1.0))(x, 0.5)
    with pytest.raises(KitError, match=r"answered \(2, 9, 4, 4\) to an input of \(2, 3, 4, 4\)"):
        denoise_fn(Recorder(3), FLOW)(x, 0.5)
    with pytest.raises(KitError, match="one per sample: 2"):
        denoise_fn(Recorder(), FLOW)(x, torch.tensor([0.1, 0.2, 0.3]))
    pooled = Cond(
        tokens=torch.ones(2, 3, 4), mask=torch.ones(2, 3, dtype=torch.bool), pooled=torch.ones(2, 4)
    )
    with pytest.raises(KitError, match=r"cond, uncond do not fit together: .*'pooled'"):
        denoise_fn(Recorder(), FLOW, cond=pooled, uncond=text(2, 0.0), guidance=2.0)(x, 0.5)


def test_a_space_that_does_not_exist_at_this_time_is_said():
    sharp = guidance.create("cfg", scale=2.0, space="eps")
    denoise = denoise_fn(Recorder(), FLOW, "flow", cond=text(2, 1.0), uncond=text(2, 0.0), guidance=sharp)
    with pytest.raises(KitError, match=r"'eps' is undefined at t=0\.0"):
        denoise(torch.randn(2, 3, 4, 4), 0.0)


def test_parts_are_the_unguided_predictions_of_the_branches():
    net, x = Recorder(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    cond, uncond = (torch.randn(2, 5, dtype=torch.float64) for _ in range(2))
    denoise = denoise_fn(net, FLOW, "flow", cond=cond, uncond=uncond, guidance=3.0, clip=0.5)
    x0, free, told = denoise.parts(x, 0.5, ("uncond", "cond"))
    assert net.sizes == [4]
    assert torch.equal(x0, denoise(x, 0.5))
    alone = [denoise_fn(Recorder(), FLOW, "flow", cond=c)(x, 0.5) for c in (uncond, cond)]
    assert torch.allclose(free, alone[0], atol=1e-13)  # rounding
    assert torch.allclose(told, alone[1], atol=1e-13)
    assert denoise.parts(x.bfloat16(), 0.5, ("uncond",))[1].dtype == torch.bfloat16


def test_where_no_guidance_acts_its_part_is_the_prediction_itself():
    net, x = Recorder(), torch.randn(2, 3, 4, 4)
    cond, uncond = torch.randn(2, 5), torch.randn(2, 5)
    limited = guidance.create("cfg", scale=3.0, interval=(2.0, 5.0))
    denoise = denoise_fn(net, FLOW, "flow", cond=cond, uncond=uncond, guidance=limited)
    x0, free = denoise.parts(x, 0.5, ("uncond",))
    assert free is x0
    assert net.sizes == [2]
    with pytest.raises(KitError, match=r"no guidance reads 'uncond'.*guidance cfg or cfg_pp"):
        denoise_fn(net, FLOW, "flow", cond=cond, uncond=uncond, guidance=1.0).parts(x, 0.5, ("uncond",))


def test_the_learned_variance_is_that_of_the_conditional_branch():
    x, cond, uncond = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))

    def network(x, t, cond):
        return torch.cat([x * cond, torch.tanh(x + cond)], 1)

    denoise = denoise_fn(network, LINEAR, "v", cond=cond, uncond=uncond, guidance=3.0)
    x0, v = denoise.with_variance(x, 500.0)
    assert torch.equal(x0, denoise(x, 500.0))
    assert torch.equal(v, torch.tanh(x + cond))
    with pytest.raises(KitError, match="no learned variance: it answers 3 channels, not 6"):
        denoise_fn(Recorder(), LINEAR).with_variance(x, 500.0)


def test_one_batched_call_or_a_call_for_each_branch():
    net, weak, x = Recorder(), Recorder(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    c, u, o = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    stack = [2.0, Away(), guidance.create("autoguidance", scale=2.0)]
    options = {"cond": c, "uncond": u, "others": {"other": o}, "networks": {"weak": weak}, "guidance": stack}
    together = denoise_fn(net, FLOW, "x0", **options)(x, 0.5)
    apart = denoise_fn(net, FLOW, "x0", execution="split", **options)(x, 0.5)
    assert (net.sizes, weak.sizes) == ([6, 2, 2, 2], [2, 2])
    assert torch.allclose(apart, together, atol=1e-13)  # rounding
    with pytest.raises(KitError, match="unknown guidance execution 'batch'; did you mean 'batched'"):
        denoise_fn(net, FLOW, execution="batch")


def test_a_run_is_a_copy_and_the_function_stays_as_it_was():
    x = torch.randn(2, 3, 4, 4)
    cond, uncond = torch.randn(2, 5), torch.randn(2, 5)
    late = guidance.create("interval", of=3.0, low=0.6, by="progress")
    denoise = denoise_fn(Recorder(), FLOW, "flow", cond=cond, uncond=uncond, guidance=late)
    short, long = denoise.begin([0.9, 0.6, 0.3]), denoise.begin([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    guided = denoise_fn(Recorder(), FLOW, "flow", cond=cond, uncond=uncond, guidance=3.0)(x, 0.5)
    assert torch.equal(short(x, 0.5), guided)  # two thirds of its steps are taken
    assert torch.equal(long(x, 0.5), denoise_fn(Recorder(), FLOW, "flow", cond=cond)(x, 0.5))
    with pytest.raises(KitError, match="needs the grid of the run"):
        denoise(x, 0.5)


def test_no_strategy_reads_anything_back_from_the_device():
    # tensors of the meta device hold no values: any read-back raises
    x = torch.empty(2, 3, 8, 8, device="meta")
    c, u, n = (torch.empty(2, 5, device="meta") for _ in range(3))
    stack = [
        guidance.create("scheduled", of={"name": "cfg_zero"}, shape="cosine"),
        guidance.create("apg", momentum=-0.5, norm=2.0),
        guidance.create("perp_neg"),
        guidance.create("compose", weights={"null": 1.0}),
        guidance.create("interval", of={"name": "cads"}, high=0.9, by="progress"),
    ]
    denoise = denoise_fn(Recorder(), FLOW, "v", cond=c, uncond=u, others={"null": n}, guidance=stack)
    for times in ([0.9, 0.5, 0.1], torch.empty(2, 3, device="meta")):
        run = denoise.begin(times, [torch.Generator() for _ in range(2)])
        if isinstance(times, list):
            assert run(x, 0.5).shape == x.shape
        assert run(x, torch.empty(2, device="meta")).shape == x.shape

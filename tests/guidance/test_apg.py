from __future__ import annotations

import pytest
import torch
from guided_networks import FLOW, Counter, answers, guided, per_sample, pictures

from imagen_kit import denoise_fn, guidance, samplers
from imagen_kit.errors import KitError

T = 0.4


def setting(batch: int = 2):
    x, cond, uncond = pictures(3, batch)
    return x, {"cond": cond, "uncond": uncond}


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "x0"])
def test_without_projection_average_and_bound_it_is_cfg(prediction):
    x, conds = setting()
    same = guided(Counter(), prediction, guidance.create("apg", scale=5.0, eta=1.0), x, T, **conds)
    # float64; the way through x0 is conditioned below 10 here
    assert torch.allclose(same, guided(Counter(), prediction, 5.0, x, T, **conds), atol=1e-12)


def test_scale_1_is_no_guidance_and_one_evaluation():
    x, conds = setting()
    net = Counter()
    one = guided(net, "x0", guidance.create("apg", scale=1.0, momentum=-0.5), x, T, **conds)
    assert torch.equal(one, guided(net, "x0", (), x, T, **conds))
    assert net.sizes == [2, 2]


def test_the_part_along_the_prediction_is_dropped():
    x, conds = setting()
    cond, uncond = answers(Counter(), x, T, conds["cond"], conds["uncond"])
    got = guided(Counter(), "x0", guidance.create("apg", scale=3.0), x, T, **conds)
    for i in range(2):  # each sample is one vector
        change, along = (cond - uncond)[i].flatten(), cond[i].flatten() / cond[i].norm()
        across = change - (change @ along) * along
        assert torch.allclose((got - cond)[i].flatten(), 2 * across, atol=1e-12)  # float64 rounding
        assert ((got - cond)[i].flatten() @ along).abs() < 1e-12


def test_the_bound_holds_for_each_sample_by_itself():
    x, conds = setting()
    cond, uncond = answers(Counter(), x, T, conds["cond"], conds["uncond"])
    lengths = (cond - uncond).flatten(1).norm(dim=1)
    bound = lengths.mean().item()
    assert lengths.min() < bound < lengths.max()
    got = guided(Counter(), "x0", guidance.create("apg", scale=3.0, eta=1.0, norm=bound), x, T, **conds)
    kept = per_sample((bound / lengths).clamp(max=1))
    assert torch.allclose(got, cond + 2 * kept * (cond - uncond), atol=1e-12)  # float64 rounding


def test_momentum_is_a_running_sum_over_the_evaluations_of_a_run():
    x, conds = setting()
    strategy = guidance.create("apg", scale=2.0, eta=1.0, momentum=-0.5)
    run = denoise_fn(Counter(), FLOW, "x0", guidance=strategy, **conds).begin()
    average = torch.zeros_like(x)
    for t in (0.9, 0.5, 0.2):
        cond, uncond = answers(Counter(), x, t, conds["cond"], conds["uncond"])
        average = (cond - uncond) - 0.5 * average
        assert torch.allclose(run(x, t), cond + average, atol=1e-12)  # float64 rounding


def test_interleaved_runs_do_not_disturb_each_other():
    x, conds = setting()
    denoise = denoise_fn(
        Counter(), FLOW, "x0", guidance=guidance.create("apg", momentum=-0.5, norm=3.0), **conds
    )
    times = (0.9, 0.5, 0.2)
    alone, first, second = denoise.begin(), denoise.begin(), denoise.begin()
    expected = [alone(x, t) for t in times]
    mixed = [(first(x, t), second(-x, t))[0] for t in times]
    assert all(torch.equal(a, b) for a, b in zip(expected, mixed, strict=True))
    again = denoise.begin()
    assert torch.equal(again(x, times[0]), expected[0])


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_samplers_begin_runs_and_batches_split(sampler):
    x, conds = setting(4)
    strategy = guidance.create("apg", scale=4.0, momentum=-0.75, norm=2.0)

    def sample(part):
        own = {name: cond[part] for name, cond in conds.items()}
        denoise = denoise_fn(Counter(0.3), FLOW, "x0", guidance=strategy, **own)
        return samplers.create(sampler).sample(denoise, x[part], FLOW, 6)

    whole = sample(slice(0, 4))
    assert torch.equal(sample(slice(0, 4)), whole)
    # float64: sums over a sample may be taken in another order
    assert torch.allclose(torch.cat([sample(slice(0, 1)), sample(slice(1, 4))]), whole, atol=1e-12)


def test_samples_outside_an_interval_keep_their_average():
    x, conds = setting()
    inner = guidance.create("apg", scale=2.0, eta=1.0, momentum=-0.5)
    strategy = guidance.create("interval", of=inner, high=1.0)  # t up to 0.5
    denoise = denoise_fn(Counter(), FLOW, "x0", guidance=strategy, **conds)
    courses = [[0.9, 0.4, 0.2], [0.5, 0.7, 0.1]]
    run = denoise.begin()
    together = [run(x, torch.tensor(pair, dtype=torch.float64)) for pair in zip(*courses, strict=True)]
    for i, course in enumerate(courses):
        own = {name: cond[i : i + 1] for name, cond in conds.items()}
        alone = denoise_fn(Counter(), FLOW, "x0", guidance=strategy, **own).begin()
        for t, got in zip(course, together, strict=True):
            # the network is told float32 times either way
            assert torch.allclose(got[i : i + 1], alone(x[i : i + 1], t), atol=1e-12)


def test_momentum_outside_a_run_is_refused():
    x, conds = setting()
    with pytest.raises(KitError, match=r"apg with momentum remembers one run: denoise = denoise\.begin\(\)"):
        guided(Counter(), "x0", guidance.create("apg", momentum=-0.5), x, T, **conds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "much"}, "apg scale must be a number"),
        ({"eta": None}, "apg eta must be a number"),
        ({"norm": 0}, "apg norm must be above 0"),
        ({"norm": -1.0}, "apg norm must be at least 0"),
        ({"momentum": 2.0}, "apg momentum must be from -1 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(KitError, match=message):
        guidance.create("apg", **options)

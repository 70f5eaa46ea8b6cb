from __future__ import annotations

import pytest
import torch
from guided_networks import FLOW, Counter, answers, guided, pictures

from imagen_kit import denoise_fn, guidance
from imagen_kit.errors import KitError
from imagen_kit.prediction import coefficients

T = 0.4


def setting():
    x, cond, null, bad, worse = pictures(5)
    return x, {"cond": cond, "uncond": bad, "others": {"null": null, "worse": worse}}


def across(value, direction):
    """The part of each sample orthogonal to a direction, by projection matrices."""
    rows = []
    for v, d in zip(value.flatten(1), direction.flatten(1), strict=True):
        rows.append(v - torch.outer(d, d) @ v / (d @ d))
    return torch.stack(rows).reshape(value.shape)


def test_only_the_orthogonal_part_of_the_negatives_acts():
    x, conds = setting()
    c, n, b, w = answers(
        Counter(), x, T, conds["cond"], conds["others"]["null"], conds["uncond"], conds["others"]["worse"]
    )
    strategy = guidance.create("perp_neg", scale=3.0, weight=0.5, negatives=["uncond", "worse"])
    net = Counter()
    got = guided(net, "x0", strategy, x, T, **conds)
    expected = n + 3 * ((c - n) - 0.5 * (across(b - n, c - n) + across(w - n, c - n)))
    assert torch.allclose(got, expected, atol=1e-12)  # float64 rounding
    assert net.sizes == [8]


@pytest.mark.parametrize("factor", [-1.5, 0.0, 0.7, 4.0])
def test_a_parallel_or_empty_negative_leaves_cfg(factor):
    x, conds = setting()
    null = conds["others"]["null"]

    def network(x, t, cond):  # linear in cond, so that its answers are parallel where conditionings are
        return x * cond

    parallel = null + factor * (conds["cond"] - null)
    strategy = guidance.create("perp_neg", scale=3.0)
    got = guided(network, "v", strategy, x, T, cond=conds["cond"], uncond=parallel, others={"null": null})
    assert torch.allclose(got, guided(network, "v", 3.0, x, T, cond=conds["cond"], uncond=null), atol=1e-12)


def test_weight_0_is_cfg_and_reads_no_negative():
    x, conds = setting()
    net = Counter()
    got = guided(
        net,
        "v",
        guidance.create("perp_neg", scale=3.0, weight=0.0),
        x,
        T,
        cond=conds["cond"],
        others=conds["others"],
    )
    plain = guided(Counter(), "v", 3.0, x, T, cond=conds["cond"], uncond=conds["others"]["null"])
    assert torch.allclose(got, plain, atol=1e-13)  # rounding
    assert net.sizes == [4]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "x0"])
def test_the_prediction_it_acts_on_makes_no_difference(prediction):
    # orthogonality is a matter of differences, which are proportional in all spaces
    x, conds = setting()
    strategy = guidance.create("perp_neg", scale=2.0)

    def network(x, t, cond):
        return torch.tanh(x * cond)

    v = guided(network, "v", strategy, x, T, **conds)
    alpha, sigma = FLOW.alpha_sigma(T)
    a, b = coefficients("v", alpha, sigma)
    p, q = coefficients(prediction, alpha, sigma)

    def other(x_, t, cond):  # the same x0, said in another way
        return (a * x.repeat(len(x_) // 2, 1, 1, 1) + b * network(x_, t, cond) - p * x_) / q

    assert torch.allclose(
        guided(other, prediction, strategy, x, T, **conds), v, atol=1e-11
    )  # float64 rounding


def test_what_is_missing_is_named():
    _, conds = setting()
    with pytest.raises(KitError, match="PerpNeg needs the conditioning 'null'; given: cond, uncond"):
        denoise_fn(
            Counter(), FLOW, cond=conds["cond"], uncond=conds["uncond"], guidance=guidance.create("perp_neg")
        )


@pytest.mark.parametrize(
    "options", [{"scale": "3"}, {"weight": -1.0}, {"negatives": []}, {"negatives": "uncond"}], ids=str
)
def test_bad_options_are_refused(options):
    with pytest.raises(KitError, match=f"perp_neg {next(iter(options))} must be"):
        guidance.create("perp_neg", **options)

from __future__ import annotations

import pytest
import torch
from guided_networks import Counter, answers, guided, pictures

from imagen_kit import guidance
from imagen_kit.errors import KitError

T = 0.4


def setting():
    x, cond, uncond, hat, fog = pictures(5)
    return x, {"cond": cond, "uncond": uncond, "others": {"hat": hat, "text:fog": fog}}


def test_prompts_add_up_around_the_unconditional_prediction():
    x, conds = setting()
    others = conds["others"]
    c, u, h, f = answers(Counter(), x, T, conds["cond"], conds["uncond"], others["hat"], others["text:fog"])
    net = Counter()
    strategy = guidance.create("compose", weights={"hat": 2.0, "text:fog": -0.5})
    got = guided(net, "x0", [7.5, strategy], x, T, **conds)
    # Liu et al. 2022: every prompt leads by its own weight, a negative one away
    assert torch.allclose(
        got, u + 7.5 * (c - u) + 2 * (h - u) - 0.5 * (f - u), atol=1e-12
    )  # float64 rounding
    assert net.sizes == [8]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "x0"])
def test_the_prompt_itself_again_adds_to_the_scale(prediction):
    x, conds = setting()
    twice = guided(
        Counter(), prediction, [3.0, guidance.create("compose", weights={"cond": 1.5})], x, T, **conds
    )
    assert torch.allclose(twice, guided(Counter(), prediction, 4.5, x, T, **conds), atol=1e-12)  # rounding


def test_weight_0_is_nothing_and_costs_nothing():
    x, conds = setting()
    net = Counter()
    none = guided(net, "v", guidance.create("compose", weights={"hat": 0.0}), x, T, **conds)
    assert torch.equal(none, guided(net, "v", (), x, T, **conds))
    assert net.sizes == [2, 2]


@pytest.mark.parametrize(
    "weights", [{}, None, [("hat", 1.0)], {"hat": "much"}, {"hat": float("nan")}], ids=str
)
def test_bad_weights_are_refused(weights):
    with pytest.raises(KitError, match="compose weight"):
        guidance.create("compose", weights=weights)


def test_strategies_keep_what_they_were_given():
    weights = {"hat": 2.0}
    strategy = guidance.create("compose", weights=weights)
    weights["hat"] = 9.0
    assert strategy == guidance.create("compose", weights={"hat": 2.0})

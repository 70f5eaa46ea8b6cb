from __future__ import annotations

import pytest
import torch
from guided_networks import FLOW, Counter, answers, guided, pictures

from imagen_kit import denoise_fn, guidance
from imagen_kit.errors import KitError

T = 0.4


def test_it_leads_away_from_the_weak_network():
    x, cond = pictures(2)
    main, weak = Counter(), Counter(0.5)
    strategy = guidance.create("autoguidance", scale=2.5)
    got = guided(main, "x0", strategy, x, T, cond=cond, networks={"weak": weak})
    (strong,), (bad,) = answers(Counter(), x, T, cond), answers(Counter(0.5), x, T, cond)
    assert torch.allclose(got, 2.5 * strong - 1.5 * bad, atol=1e-12)  # float64 rounding
    assert (main.sizes, weak.sizes) == ([2], [2])


def test_led_away_from_itself_it_is_not_guided():
    x, cond = pictures(2)
    net = Counter()
    strategy = guidance.create("autoguidance", scale=7.0)
    assert torch.equal(
        guided(net, "v", strategy, x, T, cond=cond, networks={"weak": net}),
        guided(net, "v", (), x, T, cond=cond),
    )


def test_scale_1_needs_no_other_network():
    x, cond = pictures(2)
    net = Counter()
    one = guided(net, "v", guidance.create("autoguidance", scale=1.0), x, T, cond=cond)
    assert torch.equal(one, guided(net, "v", (), x, T, cond=cond))
    assert net.sizes == [2, 2]


def test_a_weak_unconditional_network_and_cfg_add_up():
    x, cond, uncond = pictures(3)
    main, weak = Counter(), Counter(0.5)
    stack = [2.0, guidance.create("autoguidance", scale=3.0, network="small", cond="uncond")]
    got = guided(main, "x0", stack, x, T, cond=cond, uncond=uncond, networks={"small": weak})
    strong, free = answers(Counter(), x, T, cond, uncond)
    (bad,) = answers(Counter(0.5), x, T, uncond)
    assert torch.allclose(got, strong + (strong - free) + 2 * (strong - bad), atol=1e-12)  # float64 rounding
    assert (main.sizes, weak.sizes) == ([4], [2])


def test_a_missing_network_is_named():
    with pytest.raises(KitError, match="Autoguidance needs the network 'weak'; given: small"):
        denoise_fn(Counter(), FLOW, guidance=guidance.create("autoguidance"), networks={"small": Counter()})


@pytest.mark.parametrize(
    "options", [{"scale": True}, {"network": ""}, {"network": 3}, {"cond": None}], ids=str
)
def test_bad_options_are_refused(options):
    with pytest.raises(KitError, match=f"autoguidance {next(iter(options))} must be"):
        guidance.create("autoguidance", **options)

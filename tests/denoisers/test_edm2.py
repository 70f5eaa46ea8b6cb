"""What is particular to EDM2: sizes, magnitudes, forced weight normalisation, the loss's uncertainty, its files."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import checkpoints, denoisers, samplers, schedules
from imagen_kit.checkpoints.formats import Shapes
from imagen_kit.checkpoints.rules import to_foreign
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.edm2 import EDM2, MPBlock
from imagen_kit.denoisers.layers.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum
from imagen_kit.errors import KitError

# The published 125, 280, 498, 777, 1119 and 1523 million.
SIZES = {
    "edm2_xs": 124_713_253,
    "edm2_s": 280_212_837,
    "edm2_m": 497_807_781,
    "edm2_l": 777_498_085,
    "edm2_xl": 1_119_283_749,
    "edm2_xxl": 1_523_164_773,
}
LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 2, "attention": True}]


def small(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EDM2(4, levels=LEVELS, head_dim=16, num_classes=5, logvar_channels=16, **options)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    with torch.device("meta"):
        network = denoisers.create(name)
    assert sum(p.numel() for p in network.parameters()) == SIZES[name]
    attended = [k for k, m in network.named_modules() if isinstance(m, MPBlock) and m.is_self_attention]
    assert {k.split(".")[1].split("_")[0] for k in attended} == {"2", "3"}  # sides 16 and 8 of 64


@pytest.mark.parametrize(("name", "gmac"), [("edm2_s", 102), ("edm2_xxl", 552)])
def test_cost_of_an_evaluation(name, gmac):
    """The published multiply-adds of a latent of 64², which count more than matrix products."""
    with torch.device("meta"):
        network = denoisers.create(name)
        told = (torch.empty(1, 4, 64, 64), torch.empty(1), Cond(labels=torch.zeros(1, dtype=torch.long)))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(*told)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.015)


@pytest.mark.parametrize("name", SIZES)
def test_sampling_defaults_name_parts_that_exist(name):
    facts = denoisers.describe(name)["sampling"]
    assert schedules.create(**facts["schedule"]).t_max == 80
    assert (facts["prediction"], facts["steps"]) == ("edm", 32)
    assert facts["sampler"] in samplers.names()


def test_operations_keep_unit_variance():
    a, b = normal(64, 16, 32, 32), normal(64, 48, 32, 32, seed=1)
    one = pytest.approx(1, abs=0.01)  # two million samples
    assert mp_silu(a).square().mean().sqrt() == one
    assert mp_sum(a, b[:, :16], 0.3).std() == one
    both = mp_cat(a, b, 0.25)
    assert both.square().mean() == one
    # shares of 0.75 and 0.25 whatever the numbers of channels
    assert both[:, :16].square().sum() / both[:, 16:].square().sum() == pytest.approx(9, rel=0.01)
    fourier = MPFourier(256)
    assert fourier(normal(4096)).square().mean() == pytest.approx(1, abs=0.05)
    conv = MPConv(16, 64, 3)
    for scale in (0.01, 1.0, 100.0):  # of the weight, which does not matter
        conv.weight.data = normal(64, 16, 3, 3, seed=2) * scale
        assert conv(a[:8])[..., 1:-1, 1:-1].detach().std() == pytest.approx(1, abs=0.05)


def test_a_deep_network_keeps_its_magnitude():
    levels = [{"channels": 32, "blocks": 6}, {"channels": 64, "blocks": 6, "attention": True}]
    network = EDM2(4, levels=levels, head_dim=16).eval()
    spreads = []
    for module in network.modules():
        if isinstance(module, MPBlock):
            torch.nn.init.ones_(module.emb_gain)
            module.register_forward_hook(lambda *args: spreads.append(args[-1].std().item()))
    with torch.no_grad():
        network(normal(2, 4, 16, 16), torch.zeros(2))
    assert len(spreads) == 6 + 1 + 6 + 2 + 7 + 1 + 7
    assert all(0.5 < spread < 2 for spread in spreads)


def test_frequencies_stay_exact_in_bfloat16():
    network = small().eval()
    freqs, t = network.emb_fourier.freqs.clone(), torch.tensor([1.25])
    want = network.emb_fourier(t)
    network.bfloat16()
    assert network.emb_fourier.freqs.dtype == torch.float32
    assert torch.equal(network.emb_fourier.freqs, freqs)
    assert torch.equal(network.emb_fourier(t), want)
    assert network.emb_noise.weight.dtype == torch.bfloat16
    assert network.to("meta").emb_fourier.freqs.is_meta


def test_training_brings_weights_back_to_unit_variance():
    network = small()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(7)
    x, t, cond = normal(2, 4, 8, 8), torch.zeros(2), Cond(labels=torch.tensor([0, 5]))
    network.out_gain.data.fill_(1.0)
    before = network.eval()(x, t, cond)
    weights = [m.weight for m in network.modules() if isinstance(m, MPConv)]
    assert min(w.std() for w in weights) > 5  # evaluation leaves them alone
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    after = network.train()(x, t, cond)
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)  # the function is the same
    for w in weights:
        rms = w.flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-3, rtol=0)
    # two evaluations before one backward pass, as with a second loss
    (after + network(x, t, cond)).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in network.parameters())


def test_dropped_label_is_the_zero_vector():
    network = small().eval()
    t = torch.tensor([0.3])
    fourier = network.emb_noise(network.emb_fourier(t))
    got = network._embed(t, Cond(labels=torch.tensor([5])))
    torch.testing.assert_close(got, F.silu(fourier * 0.5 / math.hypot(0.5, 0.5)) / 0.596)


def test_logvar():
    network = small()
    t = torch.tensor([-1.0, 0.0, 1.0])
    u = network.logvar(t)
    assert u.shape == (3,)
    u.sum().backward()
    assert network.logvar_linear.weight.grad.abs().max() > 1e-3
    with pytest.raises(KitError, match="logvar_channels"):
        EDM2(4, levels=LEVELS, head_dim=16).logvar(t)


def test_official_files_round_trip_and_tell_their_size():
    network = small()
    arguments = {"levels": [{**level, "attention": level.get("attention", False)} for level in LEVELS]}
    format = checkpoints.get("edm2_precond_official")
    foreign = to_foreign(format.rules({**arguments, "_size": 16}), network.state_dict())
    assert {"unet.enc.16x16_conv.weight", "unet.dec.8x8_in0.attn_qkv.weight", "logvar_fourier.freqs"} <= set(
        foreign
    )
    loaded = checkpoints.from_state_dict(foreign, config={"channels_per_head": 16})
    assert type(loaded) is EDM2
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["edm2_s", "edm2_xxl"])
def test_published_sizes_are_told_by_shapes_alone(name):
    with torch.device("meta"):
        network = denoisers.create(name)
    format = checkpoints.get("edm2_precond_official")
    levels = [{"channels": 1}] * 4  # the rules need their number alone
    foreign = to_foreign(format.rules({"levels": levels}), network.state_dict())
    kwargs = format.configure(format.view(_shapes(foreign)), None)
    assert kwargs.pop("_size") == 64
    with torch.device("meta"):
        again = EDM2(**kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


def _shapes(tensors):
    return Shapes({k: tuple(v.shape) for k, v in tensors.items()})


def test_mistakes_are_named():
    faults = {
        "head_dim 24 must divide": {"levels": LEVELS, "head_dim": 24},
        "at least one": {"levels": []},
        "true or false": {"levels": [{"channels": 64, "attention": {"heads": 2}}]},
    }
    for message, config in faults.items():
        with pytest.raises(KitError, match=message):
            denoisers.create("edm2", **config)
    foreign = to_foreign(
        checkpoints.get("edm2_precond_official").rules({"levels": LEVELS, "_size": 16}), small().state_dict()
    )
    with pytest.raises(KitError, match=r"label_balance 0\.3: only the published 0\.5"):
        checkpoints.from_state_dict(foreign, config={"channels_per_head": 16, "label_balance": 0.3})

from __future__ import annotations

import math

import pytest
import torch
from guided_networks import FLOW, Counter

from imagen_kit import denoise_fn, guidance, samplers
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.guidance.cads import BLOCK

GRID = [1.0, 0.95, 0.8, 0.75, 0.7, 0.5, 0.0]


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Listener:
    """Keeps what it is told; answers x0 = mean of the real tokens."""

    def __init__(self):
        self.told: list = []

    def __call__(self, x, t, cond):
        self.told.append(cond)
        return torch.zeros_like(x)


def text(batch=2, length=20, padding=0, dim=8) -> Cond:
    tokens = 3 + 2 * torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(5))
    tokens = torch.cat([tokens, torch.zeros(batch, padding, dim)], 1)
    mask = (torch.arange(length + padding) < length).expand(batch, -1)
    pooled = torch.randn(batch, 6, generator=torch.Generator().manual_seed(6))
    return Cond(tokens=tokens, mask=mask, pooled=pooled)


def told(cond, seeds=(3, 4), grid=GRID, **options):
    """What the network is told as cond at every step of a run."""
    net = Listener()
    strategy = guidance.create("cads", **options)
    run = denoise_fn(net, FLOW, "x0", cond=cond, guidance=strategy).begin(grid, generators(seeds))
    for t in grid[:-1]:
        run(torch.zeros(len(seeds), 3, 2, 2), t)
    return net.told


def test_the_noise_is_annealed_by_steps():
    # u = 1 - i/6 = 1, 5/6, 4/6, 3/6 ...; gamma = 0, (0.9 - 5/6)/0.3, (0.9 - 4/6)/0.3, 1, ...
    clean = text(length=400)
    seen = told(clean, noise=0.5, rescale=0.0)
    gammas = [0.0, (0.9 - 5 / 6) / 0.3, (0.9 - 4 / 6) / 0.3]
    for cond, gamma in zip(seen, gammas, strict=False):
        rest = cond.tokens - math.sqrt(gamma) * clean.tokens
        # 6400 numbers: relative standard error of a spread 0.9 %, of a mean 1/80 spread
        assert rest.std().item() == pytest.approx(0.5 * math.sqrt(1 - gamma), rel=0.04)
        assert abs(rest.mean().item()) < 0.05 * 0.5
    assert all(cond is clean for cond in seen[3:])


def test_rescaling_restores_mean_and_spread_of_each_sample():
    clean = text(padding=7)
    cond = told(clean, noise=2.0, rescale=1.0)[1]
    real = clean.mask
    for i in range(2):
        before, after = clean.tokens[i][real[i]], cond.tokens[i][real[i]]
        assert (before - after).abs().max() > 1
        # float32
        assert torch.allclose(after.mean(), before.mean(), atol=1e-5)
        assert torch.allclose(after.std(), before.std(), atol=1e-5)
        assert torch.allclose(cond.pooled[i].std(), clean.pooled[i].std(), atol=1e-5)
    assert torch.equal(cond.tokens[~real], clean.tokens[~real])


def test_a_seed_repeats_and_neither_batch_nor_padding_nor_place_matters():
    short, long = text(), text(padding=BLOCK + 3)
    whole, again, padded = told(short), told(short), told(long)
    for a, b, c in zip(whole, again, padded, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.allclose(c.tokens[:, :20], a.tokens, atol=1e-6)  # float32: sums in another order
        assert torch.allclose(c.pooled, a.pooled, atol=1e-6)
    second = told(short[torch.tensor([1])], seeds=(4,))
    assert all(
        torch.allclose(b.tokens[0], a.tokens[1], atol=1e-6) for a, b in zip(whole, second, strict=True)
    )
    other = told(short, seeds=(3, 9))
    assert torch.equal(other[0].tokens[0], whole[0].tokens[0])
    assert (other[0].tokens[1] - whole[0].tokens[1]).abs().max() > 0.1


def test_every_evaluation_and_sample_has_noise_of_its_own():
    pure = {"low": 0.0, "high": 0.0, "rescale": 0.0, "noise": 1.0}  # gamma is 0 until the end
    draws = torch.cat([cond.tokens.flatten(1) for cond in told(text(length=200), **pure)])
    # 1600 numbers: correlations of independent draws are below 0.1 (4 standard errors)
    assert (torch.corrcoef(draws) - torch.eye(12)).abs().max() < 0.1


def test_only_cond_is_noised_and_with_cfg_it_is_one_call():
    net, cond, uncond = Listener(), text(), text(length=5)
    stack = [guidance.create("cads"), 3.0]
    denoise_fn(net, FLOW, "x0", cond=cond, uncond=uncond, guidance=stack).begin(GRID, generators((1, 2)))(
        torch.zeros(2, 3, 2, 2), 1.0
    )
    (both,) = net.told
    assert (both.tokens[:2] - cond.tokens).abs().max() > 0.1
    assert torch.equal(both.tokens[2:, :5], uncond.tokens)


def test_noise_0_is_plain_sampling():
    x, cond = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain = denoise_fn(Counter(), FLOW, "x0", cond=cond)(x, 0.9)
    assert torch.equal(
        denoise_fn(Counter(), FLOW, "x0", cond=cond, guidance=guidance.create("cads", noise=0.0))(x, 0.9),
        plain,
    )


def test_samplers_hand_their_generators_over_and_runs_are_apart():
    x, cond = torch.randn(2, 3, 4, 4), torch.randn(2, 6)

    def network(x, t, cond):
        return x * 0.1 + cond.mean(1).reshape(-1, 1, 1, 1) + cond.std(1).reshape(-1, 1, 1, 1) ** 2

    strategy = guidance.create("cads", noise=1.0, rescale=0.0)
    denoise = denoise_fn(network, FLOW, "x0", cond=cond, guidance=strategy)
    for name in ("euler", "ddpm", "heun"):
        sampler = samplers.create(name)
        whole = sampler.sample(denoise, x, FLOW, 4, generator=generators((7, 8)))
        assert torch.equal(sampler.sample(denoise, x, FLOW, 4, generator=generators((7, 8))), whole)
        alone = denoise_fn(network, FLOW, "x0", cond=cond[1:], guidance=strategy)
        part = sampler.sample(alone, x[1:], FLOW, 4, generator=generators((8,)))
        assert torch.allclose(part, whole[1:], atol=1e-6)  # float32
        assert not torch.equal(sampler.sample(denoise, x, FLOW, 4, generator=generators((7, 9))), whole)


def test_a_grid_for_each_sample():
    cond, grids = text(), torch.tensor([GRID, [0.9, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    net = Listener()
    strategy = guidance.create("cads", noise=1.0)
    run = denoise_fn(net, FLOW, "x0", cond=cond, guidance=strategy).begin(grids, generators((3, 4)))
    run(torch.zeros(2, 3, 2, 2), torch.tensor([0.8, 0.9], dtype=torch.float64))
    # the first sample is at step 2, the second at step 0; both noises are the first ones drawn
    early = told(cond[torch.tensor([1])], (4,), noise=1.0)[0]
    assert torch.allclose(net.told[0].tokens[1], early.tokens[0], atol=1e-5)  # float32
    assert (net.told[0].tokens[0] - cond.tokens[0]).abs().max() > 0.1


def test_what_is_missing_is_said():
    x, strategy = torch.zeros(2, 3, 2, 2), guidance.create("cads")
    with pytest.raises(KitError, match="needs the grid of the run"):
        denoise_fn(Listener(), FLOW, cond=text(), guidance=strategy)(x, 1.0)
    with pytest.raises(KitError, match="cads draws noise: give the sampler a generator"):
        denoise_fn(Listener(), FLOW, cond=text(), guidance=strategy).begin(GRID)(x, 1.0)
    for cond in (Cond(labels=torch.tensor([1, 2])), torch.tensor([1, 2]), None):
        run = denoise_fn(Listener(), FLOW, cond=cond, guidance=strategy).begin(GRID, generators((1, 2)))
        with pytest.raises(KitError, match="cads noises text embeddings, but the conditioning has none"):
            run(x, 1.0)
    run = denoise_fn(Listener(), FLOW, cond=text(), guidance=strategy).begin(GRID, generators((1, 2, 3)))
    with pytest.raises(KitError, match="cads has 3 generators for a batch of 2"):
        run(x, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "cads noise must be at least 0"),
        ({"low": 1.2}, "cads low must be from 0 to 1"),
        ({"low": 0.9, "high": 0.5}, "cads needs low ≤ high"),
        ({"rescale": None}, "cads rescale must be a number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(KitError, match=message):
        guidance.create("cads", **options)

"""UniPC: identities of its predictor, exactness of its corrector, and its options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from identities import same, sample
from sampler_oracles import mixture_denoiser

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.exponential import psi

NEVER = {"disable_corrector": list(range(50))}


def test_order_one_without_corrector_is_ddim() -> None:
    for predict in ("x0", "noise"):
        assert same(sample("unipc", order=1, predict=predict, **NEVER), sample("ddim"))


@pytest.mark.parametrize(("predict", "family"), [("x0", "dpmpp"), ("noise", "dpm_solver")])
def test_without_corrector_it_is_dpm_solver(predict: str, family: str) -> None:
    """UniP-2 with B(h) = e^h - 1 is the midpoint 2M; UniP-3 solves for the whole polynomial, as exact 3M."""
    options: dict[str, Any] = {"final": "sigma_min", "lower_order_final": False}
    ours: dict[str, Any] = {"predict": predict, **NEVER, **options}
    assert same(sample("unipc", order=2, **ours), sample(f"{family}_2m", **options))
    assert not same(sample("unipc", order=2, variant="bh1", **ours), sample(f"{family}_2m", **options))
    # Their two-answer steps differ where three would be; order 3 has them at the start alone.
    assert same(sample("unipc", order=3, **ours), sample(f"{family}_3m", curvature="exact", **options))


@pytest.mark.parametrize("predict", ["x0", "noise"])
def test_variants_differ_where_the_paper_does_not_solve(predict: str) -> None:
    """In UniP-2 and UniC-1 only: from the third order on B(h) cancels."""
    one, other = (
        samplers.create("unipc", order=4, variant=variant, predict=predict, final="sigma_min")
        for variant in ("bh1", "bh2")
    )
    for places in ([-1.0, 1.0], [-1.0, -2.5, 1.0], [-0.5, -1.5, -2.0, 1.0]):
        assert one.residual_weights(places, 0.7) == pytest.approx(other.residual_weights(places, 0.7))
    assert one.residual_weights([-1.0], 0.7) == pytest.approx([-0.35])
    assert other.residual_weights([-1.0], 0.7) == pytest.approx([-psi(1, 0.7) / 2])


@pytest.mark.parametrize("places", [[-1.0, -1.7], [-1.0, 1.0], [-0.6, -1.9, -2.2, 1.0]])
@pytest.mark.parametrize("h", [0.3, 1.4, -0.8])
def test_weights_meet_the_order_conditions(places: list[float], h: float) -> None:
    """They make ∫ e^(u - h) p(u / h) du exact for every polynomial with p(0) = 0 through the answers."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) / 2
    ours = samplers.create("unipc").residual_weights(places, h)
    for k in range(1, len(places) + 1):
        integral = float((weights / 2 * h * np.exp(h * (u - 1)) * u**k).sum())
        assert sum(w * place**k for w, place in zip(ours, places, strict=True)) == pytest.approx(integral)


def test_the_corrector_costs_nothing() -> None:
    for order in (1, 2, 3, 4):
        assert samplers.create("unipc", order=order).nfe(12) == 12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_helps(order: int) -> None:
    """30 steps against 2,000: corrected runs are nearer, by far, on the smooth part of the way."""
    flow = schedules.create("flow")
    start = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options: dict[str, Any] = {"final": "sigma_min", "lower_order_final": False}

    def run(steps: int, **more: Any) -> torch.Tensor:
        lam = np.linspace(math.log(0.2 / 0.8), math.log(0.8 / 0.2), steps + 1)
        grid = (1 / (1 + np.exp(lam))).tolist()
        sampler = samplers.create("unipc", order=order, **options, **more)
        return sampler.sample(mixture_denoiser(flow), start, flow, timesteps=grid)

    exact = run(500)
    plain, corrected = ((run(30, **more) - exact).norm().item() for more in (NEVER, {}))
    assert corrected < plain / 2


def test_a_step_without_corrector_is_one_of_the_numbers() -> None:
    assert not same(sample("unipc", disable_corrector=[2]), sample("unipc"))
    assert same(sample("unipc", disable_corrector=[6, 60]), sample("unipc"))  # the end is never corrected


def test_a_predictor_of_ones_own() -> None:
    """UniC over another multistep sampler; over the sampler that UniP is, it is UniPC."""
    options: dict[str, Any] = {"final": "sigma_min", "lower_order_final": False}
    assert same(sample("unipc", predictor="dpmpp_2m", final="sigma_min"), sample("unipc", final="sigma_min"))
    uncorrected = sample("unipc", predictor="dpmpp_3m", **NEVER, **options)
    assert same(uncorrected, sample("dpmpp_3m", final="sigma_min"))
    over_noise = sample("unipc", predictor="deis", **NEVER, **options)
    assert same(over_noise, sample("deis", final="sigma_min"))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"order": 5}, "'order' must be a whole number from 1 to 4, not 5"),
        ({"variant": "bh3"}, "unknown variant 'bh3'; did you mean 'bh"),
        ({"predict": "v"}, "unknown predict 'v'"),
        ({"disable_corrector": 3}, "'disable_corrector' must be a list of whole numbers from 0, not 3"),
        ({"disable_corrector": [-1]}, "'disable_corrector' must be a list of whole numbers from 0"),
        ({"predictor": "dpmpp_2n"}, "unknown predictor 'dpmpp_2n'; did you mean 'dpmpp_2m'"),
        ({"predictor": "heun"}, "unknown predictor 'heun'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(KitError, match=rule):
        samplers.create("unipc", **options)

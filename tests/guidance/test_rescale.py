from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.errors import KitError
from imagen_kit.prediction import from_x0, to_x0

FLOW = schedules.create("flow")
T = 0.7


def run(strategies, prediction="v", batch=2):
    generator = torch.Generator().manual_seed(2)
    x, cond, uncond = (
        torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    network = lambda x, t, c: x * c + c  # noqa: E731
    x0 = denoise_fn(network, FLOW, prediction, cond=cond, uncond=uncond, guidance=strategies)(x, T)
    return x, network(x, T, cond), network(x, T, uncond), x0


@pytest.mark.parametrize("space", ["raw", "x0", "eps"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_equations_15_and_16_of_lin_et_al_in_the_space_asked_for(phi, space):
    x, cond, uncond, got = run([3.0, guidance.create("rescale", phi=phi, space=space)])
    alpha, sigma = FLOW.alpha_sigma(T)
    if space != "raw":
        cond, uncond = (
            from_x0(space, to_x0("v", y, x, alpha, sigma), x, alpha, sigma) if space != "x0"
            else to_x0("v", y, x, alpha, sigma)
            for y in (cond, uncond)
        )  # fmt: skip
    x_cfg = uncond + 3.0 * (cond - uncond)
    std = lambda y: torch.stack([one.std() for one in y]).reshape(-1, 1, 1, 1)  # noqa: E731
    x_rescaled = x_cfg * std(cond) / std(x_cfg)
    x_final = phi * x_rescaled + (1 - phi) * x_cfg
    expected = to_x0("v" if space == "raw" else space, x_final, x, alpha, sigma)
    assert torch.allclose(got, expected, atol=1e-11)  # float64 rounding


def test_the_space_matters():
    raw, x0 = (run([5.0, guidance.create("rescale", phi=1.0, space=space)])[3] for space in ("raw", "x0"))
    assert (raw - x0).abs().max() > 0.01


def test_an_unguided_prediction_is_left_as_it_is():
    plain = run([])[3]
    assert torch.equal(run([guidance.create("rescale")])[3], plain)
    assert torch.equal(run([1.0, guidance.create("rescale", space="x0")])[3], plain)


def test_the_default_is_phi_0_7_on_the_raw_output():
    given = guidance.create("rescale", phi=0.7, space="raw")
    assert torch.equal(run([3.0, guidance.create("rescale")])[3], run([3.0, given])[3])


def test_a_flat_prediction_stays_finite_and_an_unguided_one_as_it_is():
    flat = torch.ones(2, 3, 4, 4)
    alone = denoise_fn(lambda x, t: x, FLOW, "x0", guidance=guidance.create("rescale"))
    assert torch.equal(alone(flat, T), flat)
    options = {"cond": flat, "uncond": 0.5 * flat, "guidance": [3.0, guidance.create("rescale")]}
    assert torch.isfinite(denoise_fn(lambda x, t, c: c, FLOW, "x0", **options)(flat, T)).all()


@pytest.mark.parametrize("phi", [-0.1, 1.1, "a", math.nan])
def test_phi_outside_0_to_1_is_refused(phi):
    with pytest.raises(KitError, match="rescale phi must be"):
        guidance.create("rescale", phi=phi)

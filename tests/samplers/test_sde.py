"""DPM++ SDE and DPM++ 3M SDE: their steps against the formulas written out, and the shared noise path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError

EDM = schedules.create("edm")
SIGMAS = [9.0, 4.0, 1.5, 0.6]


def curved(x: Tensor, t: float) -> Tensor:
    """Some x0 that is not linear in x, nor the same at any two levels."""
    return torch.sin(x + t) / (1 + t)


def draws(seed: int, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 2, generator=generator, dtype=torch.float64))


def run(name: str, sigmas: list[float], noises: list[Tensor], **options: Any) -> list[Tensor]:
    """The start and the states after every step."""
    states = [draws(0)[0] * sigmas[0]]
    sampler = samplers.create(name, final="sigma_min", **options)
    sampler.sample(
        curved,
        states[0],
        EDM,
        sigmas=sigmas,
        noise=iter(noises).__next__,
        callback=lambda step, x, x0: states.append(x),
    )
    return states


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("r", [0.5, 0.8])
def test_dpmpp_sde_in_sigma(eta: float, r: float) -> None:
    """k-diffusion's form: two ancestral steps in sigma, x = (down/sigma) x + (1 - down/sigma) x0 + up n."""
    noises = draws(1)
    states = run("dpmpp_sde", SIGMAS[:2], noises, eta=eta, r=r)

    def ancestral(x: Tensor, x0: Tensor, now: float, then: float, noise: Tensor) -> Tensor:
        up = eta * math.sqrt(then**2 * (now**2 - then**2)) / now
        down = math.sqrt(then**2 - up**2)
        return down / now * x + (1 - down / now) * x0 + up * noise

    x, (now, then) = states[0], SIGMAS[:2]
    stage = now ** (1 - r) * then**r
    x0 = curved(x, now)
    inner = curved(ancestral(x, x0, now, stage, noises[0]), stage)
    mixed = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * inner
    # what is left of the stage's noise at the end, and what is drawn after the stage
    up_stage = eta * stage * math.sqrt(1 - (stage / now) ** 2)
    up_late = eta * then * math.sqrt(1 - (then / stage) ** 2)
    kept = math.sqrt(then**2 - up_late**2) / stage * up_stage
    whole = (kept * noises[0] + up_late * noises[1]) / math.hypot(kept, up_late)
    torch.testing.assert_close(states[1], ancestral(x, mixed, now, then, whole), rtol=0, atol=1e-12)


def test_the_noise_of_a_whole_step_is_that_of_its_parts() -> None:
    """With eta = 1 the parts' variances add up to the step's: the noise is of one path, not rescaled."""
    now, stage, then = 4.0, 2.0, 1.0
    early, late, whole = (b**2 * (1 - (b / a) ** 2) for a, b in ((now, stage), (stage, then), (now, then)))
    assert (then / stage) ** 4 * early + late == pytest.approx(whole)
    rows = samplers.create("dpmpp_sde", final="sigma_min").tableau(EDM, sigmas=[now, then]).rows
    weights = dict(rows[-1].weights)
    assert weights["n0"] ** 2 + weights["n1"] ** 2 == pytest.approx(whole)
    assert weights["n1"] ** 2 == pytest.approx(late)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_dpmpp_3m_sde_third_step(eta: float) -> None:
    """k-diffusion's third step, with h_eta = (1 + eta) h and its phi_2, phi_3."""
    noises = draws(1)
    states = run("dpmpp_3m_sde", SIGMAS, noises, eta=eta, lower_order_final=False)
    first, second, third = (curved(x, t) for x, t in zip(states[2::-1], SIGMAS[2::-1], strict=True))
    lams = [-math.log(sigma) for sigma in SIGMAS]
    h, h1, h2 = lams[3] - lams[2], lams[2] - lams[1], lams[1] - lams[0]
    total = h * (1 + eta)
    slope, older = (first - second) / (h1 / h), (second - third) / (h2 / h)
    r0, r1 = h1 / h, h2 / h
    d1 = slope + (slope - older) * r0 / (r0 + r1)
    d2 = (slope - older) / (r0 + r1)
    phi2 = math.expm1(-total) / total + 1
    phi3 = phi2 / total - 0.5
    expected = math.exp(-total) * states[2] - math.expm1(-total) * first + phi2 * d1 - phi3 * d2
    if eta:
        expected = expected + SIGMAS[3] * math.sqrt(-math.expm1(-2 * h * eta)) * noises[2]
    torch.testing.assert_close(states[3], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpmpp_sde", {"eta": 1.5}, "'dpmpp_sde': option 'eta' must be a number from 0 to 1, not 1.5"),
        ("dpmpp_sde", {"r": 0.0}, "option 'r' must be a number from 0 to 1, not 0.0"),
        ("dpmpp_3m_sde", {"kind": "heum"}, "unknown kind 'heum'; did you mean 'heun'"),
        ("dpmpp_3m_sde", {"curvature": "exat"}, "did you mean 'exact'"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=message):
        samplers.create(name, **options)

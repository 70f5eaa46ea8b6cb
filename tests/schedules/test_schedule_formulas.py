"""Each schedule against its paper's formula, written out independently."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import schedules


def product_of(betas: list[float]) -> list[float]:
    alpha2, out = 1.0, []
    for beta in betas:
        alpha2 *= 1 - beta
        out.append(alpha2)
    return out


def test_linear() -> None:
    betas = [0.1 + (0.4 - 0.1) * i / 4 for i in range(5)]
    made = schedules.create("linear", beta_start=0.1, beta_end=0.4, timesteps=5)
    assert made.alphas_cumprod.tolist() == pytest.approx(product_of(betas), rel=1e-14)


def test_scaled_linear() -> None:
    betas = [(math.sqrt(0.1) + (math.sqrt(0.4) - math.sqrt(0.1)) * i / 4) ** 2 for i in range(5)]
    made = schedules.create("scaled_linear", beta_start=0.1, beta_end=0.4, timesteps=5)
    assert made.alphas_cumprod.tolist() == pytest.approx(product_of(betas), rel=1e-14)


def test_cosine_is_imagens() -> None:
    made = schedules.create("cosine")
    for t in (0.1, 0.5, 0.9):
        assert made.alpha_sigma(t) == pytest.approx((math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)))
        assert made.log_snr(t) == pytest.approx(-2 * math.log(math.tan(math.pi * t / 2)))


@pytest.mark.parametrize("options", [{}, {"timesteps": 100}])
def test_cosine_shift_moves_log_snr(options: dict[str, int]) -> None:
    """log-SNR - 2 log(shift), as simple diffusion has it for a resolution ``shift`` times 64."""
    t = torch.tensor([0.2, 0.6], dtype=torch.float64) * options.get("timesteps", 1)
    plain, shifted = schedules.create("cosine", **options), schedules.create("cosine", shift=4.0, **options)
    torch.testing.assert_close(shifted.log_snr(t), plain.log_snr(t) - 2 * math.log(4), rtol=1e-12, atol=1e-12)


def test_continuous_sigmoid_is_jabris() -> None:
    """gamma(t) = (s(end) - s(t (end - start) + start)) / (s(end) - s(start)), s logistic in z / tau."""

    def s(z: float) -> float:
        return 1 / (1 + math.exp(-z / 0.9))

    made = schedules.create("sigmoid", timesteps=None, start=0.0, end=3.0, tau=0.9)
    for t in (0.1, 0.5, 0.9):
        gamma = (s(3.0) - s(3.0 * t)) / (s(3.0) - s(0.0))
        assert made.alpha_sigma(t) == pytest.approx((math.sqrt(gamma), math.sqrt(1 - gamma)))


def test_discrete_sigmoid() -> None:
    betas = [0.1 + 0.3 / (1 + math.exp(6 - 3 * i)) for i in range(5)]
    made = schedules.create("sigmoid", beta_start=0.1, beta_end=0.4, timesteps=5)
    assert made.alphas_cumprod.tolist() == pytest.approx(product_of(betas), rel=1e-14)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "peer"), [("sigmoid", "sigmoid"), ("linear", "linear")])
def test_peer_tables(name: str, peer: str) -> None:
    """The peer's table is made in float32."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=peer).alphas_cumprod.double()
    torch.testing.assert_close(schedules.create(name).alphas_cumprod, theirs, rtol=1e-4, atol=1e-6)


def test_edm_time_is_sigma() -> None:
    made = schedules.create("edm", sigma_min=0.01, sigma_max=50.0, sigma_data=0.7)
    assert made.alpha_sigma(3.5) == (1.0, 3.5)
    assert (made.t_min, made.t_max, made.sigma_data) == (0.01, 50.0, 0.7)
    assert made.t_of_ratio(3.5) == pytest.approx(3.5)


def test_flow_is_a_straight_line_and_shift_moves_times_only() -> None:
    made = schedules.create("flow", shift=3.0)
    assert made.alpha_sigma(0.25) == (0.75, 0.25)
    assert [made.shift_time(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.75, 1.0])
    # the shift multiplies sigma / alpha
    assert made.shift_time(0.2) / (1 - made.shift_time(0.2)) == pytest.approx(3 * 0.2 / 0.8)
    assert schedules.create("edm").shift_time(4.0) == 4.0

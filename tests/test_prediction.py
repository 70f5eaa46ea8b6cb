"""Every prediction against its definition, and loss weights against their equivalences."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit import prediction, schedules
from imagen_kit.errors import KitError
from imagen_kit.prediction import PREDICTIONS

ALPHA_SIGMA = [(0.8, 0.6), (0.25, 0.75), (1.0, 3.0), (0.999, 0.0447)]
GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE = (torch.randn(4, 3, 2, 2, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def test_the_known_predictions() -> None:
    assert PREDICTIONS == ("eps", "x0", "v", "flow", "edm")
    with pytest.raises(KitError, match="unknown prediction 'flw'; did you mean 'flow'"):
        prediction.coefficients("flw", 0.5, 0.5)


@pytest.mark.parametrize(("alpha", "sigma"), ALPHA_SIGMA)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_target_gives_x0_and_noise_back(name: str, alpha: float, sigma: float) -> None:
    """A network that answers the target exactly knows x0 and the noise, on any schedule."""
    x = alpha * X0 + sigma * NOISE
    output = prediction.target(name, X0, NOISE, alpha, sigma, 0.7)
    close = {"rtol": 0, "atol": 1e-12}  # float64 with coefficients up to 22
    torch.testing.assert_close(prediction.to_x0(name, output, x, alpha, sigma, 0.7), X0, **close)
    torch.testing.assert_close(prediction.to_eps(name, output, x, alpha, sigma, 0.7), NOISE, **close)
    torch.testing.assert_close(prediction.from_x0(name, X0, x, alpha, sigma, 0.7), output, **close)


def test_targets_by_definition() -> None:
    alpha, sigma = 0.8, 0.6
    torch.testing.assert_close(prediction.target("v", X0, NOISE, alpha, sigma), alpha * NOISE - sigma * X0)
    torch.testing.assert_close(prediction.target("flow", X0, NOISE, alpha, sigma), NOISE - X0)
    assert prediction.target("eps", X0, NOISE, alpha, sigma) is NOISE
    assert prediction.target("x0", X0, NOISE, alpha, sigma) is X0


def test_edm_is_karras_preconditioning() -> None:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, Table 1."""
    sigma, data = 3.0, 0.5
    total = sigma**2 + data**2
    a, b = prediction.coefficients("edm", 1.0, sigma, data)
    assert (a, b) == pytest.approx((data**2 / total, sigma * data / math.sqrt(total)))
    scaled, time = prediction.network_input("edm", X0, sigma, 1.0, sigma, data)
    torch.testing.assert_close(scaled, X0 / math.sqrt(total))
    assert time == pytest.approx(math.log(sigma) / 4)
    # inputs and targets of unit variance when the data's standard deviation is sigma_data
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    target = prediction.target("edm", data * x0, noise, 1.0, sigma, data)
    assert target.std().item() == pytest.approx(1.0, abs=0.01)  # 200,000 draws: standard error 0.002


@pytest.mark.parametrize("name", PREDICTIONS[:-1])
def test_other_networks_see_x_and_t_as_they_are(name: str) -> None:
    assert prediction.network_input(name, X0, 0.3, 0.8, 0.6) == (X0, 0.3)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_coefficient_a_sample(name: str) -> None:
    """(b,) tensors of alpha and sigma act on their own sample, as floats do."""
    alpha, sigma = (torch.tensor(column, dtype=torch.float64) for column in zip(*ALPHA_SIGMA, strict=True))
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    together = prediction.to_x0(name, X0, x, alpha, sigma)
    apart = [prediction.to_x0(name, X0[i], x[i], *ALPHA_SIGMA[i]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(apart), rtol=0, atol=1e-12)
    told, time = prediction.network_input(name, x, alpha, alpha, sigma)
    assert told.shape == x.shape
    assert time.shape == (4,)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_half_precision_keeps_its_dtype(name: str) -> None:
    output, x = X0.bfloat16(), NOISE.bfloat16()
    got = prediction.to_x0(name, output, x, 0.8, 0.6)
    assert got.dtype == torch.bfloat16
    exact = prediction.to_x0(name, output.double(), x.double(), 0.8, 0.6)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once, at the end


def test_where_the_output_does_not_tell() -> None:
    for name in ("eps", "edm"):
        with pytest.raises(KitError, match=f"{name!r} does not tell x0 where alpha = 0"):
            prediction.coefficients(name, 0.0, 1.0)
    for name in ("v", "flow", "x0"):
        output = prediction.target(name, X0, NOISE, 0.0, 1.0)
        torch.testing.assert_close(prediction.to_x0(name, output, NOISE, 0.0, 1.0), X0)
    with pytest.raises(KitError, match="where sigma = 0"):
        prediction.from_x0("eps", X0, X0, 1.0, 0.0)
    with pytest.raises(KitError, match="where sigma = 0"):
        prediction.to_eps("x0", X0, X0, 1.0, 0.0)
    for name in ("eps", "v", "flow"):
        output = prediction.target(name, X0, NOISE, 1.0, 0.0)
        torch.testing.assert_close(prediction.to_eps(name, output, X0, 1.0, 0.0), NOISE)


@pytest.mark.parametrize("kind", ["min_snr", "edm"])
@pytest.mark.parametrize(("alpha", "sigma"), ALPHA_SIGMA)
def test_weighted_losses_agree(kind: str, alpha: float, sigma: float) -> None:
    """The same error in x0 costs the same, whatever the network predicts."""
    x = alpha * X0 + sigma * NOISE
    wrong_x0 = X0 + 0.1 * NOISE
    losses = []
    for name in PREDICTIONS:
        error = prediction.from_x0(name, wrong_x0, x, alpha, sigma) - prediction.target(
            name, X0, NOISE, alpha, sigma
        )
        weight = prediction.loss_weight(name, alpha, sigma, kind)
        losses.append((weight * error.pow(2).mean()).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_min_snr_weights_are_the_published_ones(t: float) -> None:
    """min(SNR, 5) / SNR for eps, min(SNR, 5) for x0, min(SNR, 5) / (SNR + 1) for v."""
    alpha, sigma = schedules.create("cosine").alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    clipped = min(snr, 5.0)
    expected = {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}
    for name, weight in expected.items():
        assert prediction.loss_weight(name, alpha, sigma, "min_snr") == pytest.approx(weight)
        tensors = torch.tensor([alpha]).double(), torch.tensor([sigma]).double()
        assert prediction.loss_weight(name, *tensors, kind="min_snr").item() == pytest.approx(weight)


def test_edm_weight_is_karras() -> None:
    """lambda(sigma) = (sigma² + data²) / (sigma data)² on D, so 1 on F (Karras et al. 2022, Table 1)."""
    sigma, data = 2.0, 0.5
    weight = prediction.loss_weight("x0", 1.0, sigma, "edm", sigma_data=data)
    assert weight == pytest.approx((sigma**2 + data**2) / (sigma * data) ** 2)
    assert prediction.loss_weight("edm", 1.0, sigma, "edm", sigma_data=data) == 1.0


def test_uniform_weight_is_one_everywhere() -> None:
    for name in PREDICTIONS:
        assert prediction.loss_weight(name, 0.0, 1.0) == 1.0
        assert prediction.loss_weight(name, torch.rand(3), torch.rand(3)).tolist() == [1.0] * 3
    with pytest.raises(KitError, match="unknown loss weight 'minsnr'; did you mean 'min_snr'"):
        prediction.loss_weight("eps", 0.5, 0.5, "minsnr")

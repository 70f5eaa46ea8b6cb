"""Classifier guidance on Gaussian classes, where Bayes' rule says what it must give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imagen_kit import denoise_fn, guidance, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.guidance.classifier import Classifier
from imagen_kit.prediction import from_x0

SPREAD, CLASSES = 0.6, 3
MEANS = torch.randn(CLASSES, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LABELS = torch.tensor([2, 0, 1])


class Problem:
    """x0 of class y ~ N(mean_y, SPREAD²): its noisy classes, and what a network that knows no class says."""

    def __init__(self, schedule, prediction: str):
        self.schedule, self.prediction = schedule, prediction
        self.calls = 0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t.double())
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def logits(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """log p(x_t | y) up to what all classes share, exact for equally likely classes."""
        self.calls += 1
        alpha, sigma = self.levels(t)
        variance = alpha**2 * SPREAD**2 + sigma**2
        gaps = x[:, None] - alpha[:, None] * MEANS
        return -(gaps**2).sum((2, 3, 4)) / (2 * variance.reshape(-1, 1))

    def x0(self, x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """E[x0 | x_t] when class k has probability ``weights[:, k]``."""
        alpha, sigma = self.levels(t)
        variance = alpha**2 * SPREAD**2 + sigma**2
        mean = torch.einsum("bk,kchw->bchw", weights, MEANS)
        return mean + alpha * SPREAD**2 / variance * (x - alpha * mean)

    def network(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0 = self.x0(x, t, self.logits(x, t).softmax(-1))
        return from_x0(self.prediction, x0, x, *self.levels(t))


def problem(schedule="linear", prediction="eps"):
    return Problem(schedules.create(schedule), prediction)


def noisy() -> Tensor:
    return torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def denoiser(ideal: Problem, *strategies, **options):
    return denoise_fn(
        ideal.network,
        ideal.schedule,
        ideal.prediction,
        cond=Cond(labels=LABELS),
        guidance=strategies,
        networks={"classifier": ideal.logits},
        **options,
    )


TIMES = {"linear": [5.0, 300.0, 800.0], "flow": [0.05, 0.4, 0.9], "cosine": [0.1, 0.5, 0.9]}


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [*((s, p) for s in ("linear", "cosine") for p in ("eps", "x0", "v")), ("flow", "flow")],
)
def test_scale_1_is_bayes_rule(schedule, prediction):
    """The denoiser of all classes, led by the exact classifier, is the denoiser of the class."""
    ideal = problem(schedule, prediction)
    one_hot = torch.nn.functional.one_hot(LABELS, CLASSES).double()
    for t in TIMES[schedule]:
        found = denoiser(ideal, guidance.create("classifier"))(noisy(), t)
        wanted = ideal.x0(noisy(), torch.full((3,), t), one_hot)
        # the logits pass through float32, and eps → x0 divides by alpha
        alpha, sigma = ideal.schedule.alpha_sigma(t)
        assert torch.allclose(found, wanted, atol=3e-5 * max(1.0, (sigma / alpha) ** 2, 1 / sigma))
        if t == max(TIMES[schedule]):
            assert not torch.allclose(found, denoiser(ideal)(noisy(), t), atol=1e-2)


def test_the_scale_multiplies_the_gradient():
    ideal, t, x = problem(), 400.0, noisy()
    plain, *guided = (denoiser(ideal, Classifier(scale=s))(x, t) for s in (0.0, 1.0, 3.0))
    assert torch.equal(plain, denoiser(ideal)(x, t))
    assert torch.allclose(guided[1] - plain, 3 * (guided[0] - plain), atol=1e-6)


def test_samples_with_their_own_times():
    ideal, x = problem(), noisy()
    times = torch.tensor([50.0, 400.0, 900.0], dtype=torch.float64)
    together = denoiser(ideal, Classifier(scale=2.0))(x, times)
    for i, t in enumerate(times.tolist()):
        alone = denoise_fn(
            ideal.network,
            ideal.schedule,
            cond=Cond(labels=LABELS[i : i + 1]),
            guidance=Classifier(scale=2.0),
            networks={"classifier": ideal.logits},
        )(x[i : i + 1], t)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-9)


def test_nothing_is_recorded_and_nothing_is_asked_at_scale_0():
    ideal = problem()
    with torch.no_grad():
        found = denoiser(ideal, Classifier(), execution="split")(noisy(), 300.0)
    assert not found.requires_grad
    calls = ideal.calls
    denoiser(ideal, Classifier(scale=0.0))(noisy(), 300.0)
    assert ideal.calls == calls + 1  # the network's own


def test_it_goes_with_thresholding_and_samplers():
    ideal = problem()
    stack = [Classifier(scale=1.0), guidance.create("static_threshold", limit=4.0)]
    x = samplers.create("ddim").sample(denoiser(ideal, *stack), 1.0 * noisy(), ideal.schedule, 30)
    # samples of a class lie around its mean, nearer to it than to others
    gaps = (x[:, None] - MEANS).flatten(2).norm(dim=-1)
    assert gaps.argmin(1).tolist() == LABELS.tolist()
    assert math.isfinite(float(x.abs().max()))


@torch.no_grad()
def test_the_published_sampler_written_out():
    """Algorithm 2 of Dhariwal & Nichol 2021 with their code's clipping: what the network says, and only that."""
    ideal, scale, grid = problem(), 2.0, [900.0, 700.0, 400.0, 100.0]
    strategies = [guidance.create("static_threshold"), Classifier(scale=scale)]
    found = samplers.create("ddim").sample(
        denoiser(ideal, *strategies), noisy(), ideal.schedule, timesteps=grid
    )
    x = noisy()
    for t, then in zip(grid, [*grid[1:], None], strict=True):
        alpha, sigma = ideal.schedule.alpha_sigma(t)
        after = (1.0, 0.0) if then is None else ideal.schedule.alpha_sigma(then)
        times = torch.full((3,), t)
        clipped = ((x - sigma * ideal.network(x, times, Cond(labels=LABELS))) / alpha).clamp(-1, 1)
        # the gradient of log p(y | x_t) for Gaussian classes: (alpha mean - x) / variance, less its expectation
        chances = ideal.logits(x, times).softmax(-1)
        expected = torch.einsum("bk,kchw->bchw", chances, MEANS)
        gradient = alpha * (MEANS[LABELS] - expected) / (alpha**2 * SPREAD**2 + sigma**2)
        eps = (x - alpha * clipped) / sigma - scale * sigma * gradient
        x = after[0] * (x - sigma * eps) / alpha + after[1] * eps
    # logits pass through float32
    assert torch.allclose(found, x, atol=1e-5)


def test_what_it_needs():
    ideal = problem()
    with pytest.raises(KitError, match="needs the network 'classifier'; given: none"):
        denoise_fn(ideal.network, ideal.schedule, cond=Cond(labels=LABELS), guidance=Classifier())
    with pytest.raises(KitError, match="needs class labels"):
        denoise_fn(
            ideal.network,
            ideal.schedule,
            cond=Cond(pooled=torch.zeros(3, 1)),
            guidance=Classifier(),
            networks={"classifier": ideal.logits},
        )(noisy(), 300.0)
    other = problem("edm", "edm")
    with pytest.raises(KitError, match="not of edm"):
        denoiser(other, Classifier())
    with pytest.raises(KitError, match="classifier scale must be a number"):
        guidance.create("classifier", scale="1")
    with pytest.raises(KitError, match="classifier network must be a name"):
        guidance.create("classifier", network="")


def test_another_scale():
    assert Classifier(scale=2.0).with_scale(4.0) == Classifier(scale=4.0)

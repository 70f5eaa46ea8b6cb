"""Ideal denoisers against what defines them: scores by autograd, moments, limits and recorded solutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from imagen_kit import denoisers, recipe, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError

DATA = Path(__file__).parents[1] / "data" / "samplers"
FLOW = schedules.create("flow")
LEVELS = [(1.0, 0.02), (0.9, 0.3), (0.5, 0.5), (0.05, 0.9), (0.0, 1.0), (1.0, 30.0)]

every = pytest.mark.parametrize("name", analytic.PROBLEMS)


def draw(problem, alpha, sigma, b=5, seed=0):
    """Noisy samples of the problem itself, where a sampler's states lie."""
    g = torch.Generator().manual_seed(seed)
    x0 = problem.sample(b, g)
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=g, dtype=torch.float64)


@every
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_answers_are_tweedies_formula(name, alpha, sigma):
    """E[eps | x] = -sigma grad log p(x), and x = alpha E[x0] + sigma E[eps] (Tweedie; Efron 2011)."""
    problem = analytic.problem(name)
    x = draw(problem, alpha, sigma).requires_grad_()
    (score,) = torch.autograd.grad(problem.log_prob(x, alpha, sigma).sum(), x)
    x = x.detach()
    noise, x0 = problem.noise(x, alpha, sigma), problem.x0(x, alpha, sigma)
    # rounding of (x - alpha m) / std, of the order of 1e3 numbers of 50 at most
    torch.testing.assert_close(noise, -sigma * score, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alpha * x0 + sigma * noise, x, rtol=1e-11, atol=1e-12)


def test_density_is_that_of_torch_distributions():
    data = analytic.problem("gmm2d")
    x = draw(data, 1.0, 0.4)
    alpha, sigma = 0.7, 0.4
    parts = torch.distributions.Independent(
        torch.distributions.Normal(alpha * data.means, (alpha**2 * data.stds**2 + sigma**2).sqrt()), 1
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(data.weights), parts)
    torch.testing.assert_close(data.log_prob(x, alpha, sigma), mixture.log_prob(x), rtol=1e-12, atol=1e-12)


def test_gaussian_is_linear_regression():
    data = analytic.problem("gaussian")
    x = draw(data, 0.6, 0.8)
    gain = 0.6 * data.covariance.diag() / (0.36 * data.covariance.diag() + 0.64)
    torch.testing.assert_close(data.x0(x, 0.6, 0.8), data.mean + gain * (x - 0.6 * data.mean))


@every
def test_moments_of_samples(name):
    data = analytic.problem(name)
    count = 20_000 if len(data.shape) == 1 else 3000
    drawn = data.sample(count, torch.Generator().manual_seed(1)).flatten(1)
    variance = data.covariance.diag()
    # four and a half standard errors; fourth moments of these bounded mixtures are below 3 variance²
    assert ((drawn.mean(0) - data.mean.flatten()).abs() < 4.5 * (variance / count).sqrt()).all()
    assert ((drawn.var(0) - variance).abs() < 4.5 * variance * (2 / count) ** 0.5).all()
    if len(data.shape) == 1:
        off = torch.cov(drawn.T)[0, 1] - data.covariance[0, 1]
        assert off.abs() < 4.5 * (variance.prod() * 3 / count).sqrt()


@every
def test_pure_noise_tells_the_mean_and_no_noise_the_sample(name):
    data = analytic.problem(name)
    x = draw(data, 0.0, 1.0)
    torch.testing.assert_close(data.x0(x, 0.0, 1.0), data.mean.expand_as(x))
    torch.testing.assert_close(data.noise(x, 0.0, 1.0), x)
    x0 = data.sample(4, torch.Generator().manual_seed(2))
    for sigma in (0.0, 1e-300, 1e-160, 1e-30, 1e-9):
        torch.testing.assert_close(data.x0(0.8 * x0, 0.8, sigma), x0)
    assert data.noise(0.8 * x0, 0.8, 0.0).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_finite(name, dtype):
    data = analytic.problem(name)
    for alpha, sigma in [*LEVELS, (1.0, 0.0), (1.0, 1e-25), (1e-25, 1.0)]:
        x = draw(data, alpha, sigma).to(dtype)
        want, got = data.x0(x.double(), alpha, sigma), data.x0(x, alpha, sigma)
        assert got.dtype == dtype
        # float32: logits of up to 3e3 round to 2e-4; bfloat16 inputs are the same, the answer rounds to 2^-9
        atol = 2e-3 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), want, rtol=atol, atol=atol)


@every
def test_per_sample_times_and_batch_split(name):
    data, schedule = analytic.problem(name), schedules.create("scaled_linear")
    denoise, t = data.denoise(schedule), torch.tensor([999.0, 500.0, 3.5])
    x = draw(data, 0.5, 0.5, b=3)
    together = denoise(x, t)
    for i in range(3):
        # a batch of one may sum in another order
        torch.testing.assert_close(
            together[i : i + 1], denoise(x[i : i + 1], t[i].item()), rtol=1e-13, atol=1e-13
        )


def test_labels_pick_components():
    data = analytic.problem("gmm2d")
    x, labels = draw(data, 0.5, 0.5, b=3), torch.tensor([2, 4, 0])
    got = data.x0(x, 0.5, 0.5, labels)
    for i, k in ((0, 2), (2, 0)):
        alone = analytic.Gaussian(data.means[k], data.stds[k])
        torch.testing.assert_close(got[i], alone.x0(x[i : i + 1], 0.5, 0.5)[0])
    torch.testing.assert_close(got[1], data.x0(x, 0.5, 0.5)[1])


# ---- the exact solution --------------------------------------------------------------------------------------------


def reference():
    with safe_open(DATA / "ode_reference.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["gmm"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def test_the_recorded_mixture_is_the_named_one():
    recorded, data = reference()[0], analytic.problem("gmm2d")
    for key in ("weights", "means", "stds"):
        torch.testing.assert_close(getattr(data, key), torch.tensor(recorded[key], dtype=torch.float64))


def test_recorded_flow_solution():
    data, tensors = analytic.problem("gmm2d"), reference()[1]
    times, states = tensors["flow.t"].tolist(), tensors["flow.x"]
    for i in (len(times) // 2, len(times) - 1):  # midway, and at the clean end
        got = analytic.solve_ode(data, states[0], FLOW, times[0], times[i])
        torch.testing.assert_close(
            got, states[i], rtol=0, atol=1e-10
        )  # the recording's own accuracy is 2e-12


def test_recorded_variance_exploding_solution():
    data, tensors = analytic.problem("gmm2d"), reference()[1]
    sigmas, states = tensors["ve.edm_80.sigma"].tolist(), tensors["ve.edm_80.ve_init"]
    got = analytic.solve_ode(data, states[0], schedules.create("edm"), 80.0, sigmas[-1])
    torch.testing.assert_close(got, states[-1], rtol=0, atol=1e-10)  # as above


def test_gaussian_solution_by_formula_is_the_integrated_one():
    exact = analytic.problem("gaussian")
    same = analytic.GaussianMixture([1.0], exact.means, exact.stds)
    x = draw(exact, 0.1, 0.9)
    for start, end in ((0.9, 0.0), (1.0, 0.2)):
        got, want = (analytic.solve_ode(p, x, FLOW, start, end) for p in (same, exact))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)  # tolerance 1e-12 a step


def test_data_without_width_ends_on_its_points():
    data = analytic.problem("points")
    x = draw(data, 0.0, 1.0, b=8)
    end = analytic.solve_ode(data, x, FLOW, 1.0, 0.0)
    nearest = torch.cdist(end, data.means).min(1).values
    assert nearest.max() < 1e-12
    middle = analytic.solve_ode(data, x, FLOW, 1.0, 0.3)
    torch.testing.assert_close(analytic.solve_ode(data, middle, FLOW, 0.3, 0.0), end, rtol=0, atol=1e-10)


def test_a_sampler_converges_to_it():
    data = analytic.problem("gmm_image")
    x = draw(data, 0.0, 1.0, b=2)
    sampler = samplers.create("dpmpp_2m", spacing="log_snr", final="sigma_min")
    times = sampler.tableau(FLOW, 2).times
    exact = analytic.solve_ode(data, x, FLOW, times[0], times[-1], rtol=1e-8)
    denoise = data.denoise(FLOW)
    errors = [(sampler.sample(denoise, x, FLOW, n) - exact).square().mean().sqrt() for n in (40, 160)]
    assert errors[1] < errors[0] / 12  # second order in the limit: 1/16


# ---- as networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "gaussian_mixture", "finite_data"])
def test_networks_answer_in_every_prediction(name):
    schedule = schedules.create("scaled_linear")
    t, x = torch.tensor([900.0, 20.0]), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    networks = {
        p: denoisers.create(name, schedule=schedule, prediction=p) for p in ("x0", "eps", "v", "flow")
    }
    x0, eps, v, flow = (network(x, t, Cond()) for network in networks.values())
    alpha, sigma = (c.float().reshape(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-4, atol=1e-4)  # float32
    torch.testing.assert_close(alpha * eps - sigma * x0, v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eps - x0, flow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0, networks["x0"].problem.denoise(schedule)(x, t))


def test_network_options():
    network = denoisers.create(
        "gaussian_mixture", means=[0.5, [0.1, 0.2, 0.3]], stds=[0.1, 0.2], image_size=4
    )
    torch.testing.assert_close(network.problem.means[1, :, 2, 2], torch.tensor([0.1, 0.2, 0.3]).double())
    assert network.problem.stds.amax((1, 2, 3)).tolist() == [0.1, 0.2]
    x, t = torch.zeros(1, 3, 4, 4), torch.tensor([0.9])
    one = network(x, t, Cond(labels=torch.tensor([0])))
    assert (one - network(x, t, Cond(labels=torch.tensor([1])))).abs().max() > 0.1


def test_patterns_differ():
    waves = analytic.patterns(8, (3, 16, 16)).flatten(1)
    assert torch.pdist(waves).min() > 5


def test_a_recipe_wires_schedule_and_prediction(tmp_path):
    stage = """
  - name: base
    size: 8
    prediction: v
    schedule: {name: flow, shift: 3.0}
    denoiser: {name: gaussian_mixture, means: [0.5, -0.5], stds: 0.05}
    sampler: {name: dpmpp_2m, steps: 20}
"""
    file = tmp_path / "ideal.yaml"
    file.write_text(f"name: ideal\ntext_encoder: {{name: t5, weights: random, size: tiny}}\nstages:{stage}")
    pipeline = recipe.load(file).build()
    network = pipeline.stages[0].denoiser
    assert (network.prediction, network.schedule.shift, network.problem.shape) == ("v", 3.0, (3, 8, 8))
    pictures = pipeline("anything", num=4).tensor * 2 - 1
    assert ((pictures.mean((1, 2, 3)).abs() - 0.5).abs() < 0.03).all()  # a component's mean; 0.05 / sqrt(192)
    with pytest.raises(KitError, match="'edm'"):
        recipe.load(file, ["stages.0.prediction=edm"]).build()


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: analytic.problem("gmm2"), "unknown analytic problem 'gmm2'; did you mean 'gmm2d'"),
        (lambda: analytic.GaussianMixture([1.0, -1.0], [[0.0], [1.0]], 1.0), "weights must be above 0"),
        (lambda: analytic.GaussianMixture([1.0], [[0.0], [1.0]], 1.0), r"weights \(k,\) and means"),
        (lambda: analytic.Gaussian([0.0, 1.0], [1.0, 1.0, 1.0]), "do not fit means"),
        (lambda: analytic.Gaussian([0.0, 1.0], -1.0), "must not be negative"),
        (lambda: analytic.FiniteData([[0.0, 1.0], [0.0]]), "lists of equal length"),
        (
            lambda: analytic.problem("gmm2d").x0(torch.zeros(1, 3), 1.0, 1.0),
            r"shape \(2,\), but x is \(1, 3\)",
        ),
        (
            lambda: denoisers.create("gaussian", prediction="edm"),
            "unknown prediction of an analytic denoiser",
        ),
        (lambda: denoisers.create("gaussian", mean=[0.0, 1.0]), "a picture's numbers are one, 3 or"),
        (lambda: denoisers.create("finite_data", points=[]), "at least one entry"),
    ],
)
def test_bad_input_is_told_in_one_line(build, rule):
    with pytest.raises(KitError, match=rule) as caught:
        build()
    assert "\n" not in str(caught.value)

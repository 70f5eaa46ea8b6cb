"""k-diffusion's convention: its models in our samplers, ours in its."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import denoise_fn, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError
from imagen_kit.interop import k_diffusion

DATA = analytic.problem("gmm2d")
EDM = schedules.create("edm")


def model(x: torch.Tensor, sigma: torch.Tensor, **extra_args: torch.Tensor) -> torch.Tensor:
    """The ideal k-diffusion model of the mixture."""
    assert sigma.shape == (len(x),)
    return DATA.x0(x, torch.ones_like(sigma), sigma) + extra_args.get("offset", 0.0)


@pytest.mark.parametrize("name", ["edm", "scaled_linear", "flow"])
def test_a_wrapped_model_samples_on_any_schedule(name: str) -> None:
    schedule, sampler = schedules.create(name), samplers.create("dpmpp_2m", spacing="log_snr")
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * sampler.tableau(schedule, 8).prior_std
    got = sampler.sample(k_diffusion.wrap(model, schedule), x, schedule, 8)
    torch.testing.assert_close(
        got, sampler.sample(DATA.denoise(schedule), x, schedule, 8), rtol=1e-9, atol=1e-9
    )


def test_extra_arguments_and_guidance_reach_the_model() -> None:
    x, t = torch.randn(3, 2, dtype=torch.float64), 2.0
    wrapped = k_diffusion.wrap(model, offset=torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(wrapped(x, t) - 0.25, model(x, torch.full((3,), 2.0, dtype=torch.float64)))

    def told(x: torch.Tensor, sigma: torch.Tensor, cond: Cond) -> torch.Tensor:
        return 0 * x + cond.labels[:, None]

    labels = Cond(labels=torch.tensor([1, 2, 3])), Cond(labels=torch.tensor([0, 0, 0]))
    denoise = denoise_fn(k_diffusion.wrap(told), EDM, "x0", cond=labels[0], uncond=labels[1], guidance=2.0)
    torch.testing.assert_close(denoise(x, t)[:, 0], torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64))


def test_no_signal_is_no_state_of_theirs() -> None:
    flow = schedules.create("flow")
    with pytest.raises(KitError, match="alpha = 0"):
        k_diffusion.wrap(model, flow)(torch.zeros(1, 2), 1.0)


@pytest.mark.parametrize("name", ["edm", "scaled_linear", "flow"])
def test_ours_as_theirs(name: str) -> None:
    schedule = schedules.create(name)
    exported = k_diffusion.model(DATA.denoise(schedule), schedule)
    x, sigma = torch.randn(3, 2, dtype=torch.float64), torch.tensor([5.0, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(exported(x, sigma), model(x, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        ("sample_euler", "euler", {}),
        ("sample_heun", "heun", {}),
        ("sample_dpmpp_2m", "dpmpp_2m", {}),
        ("sample_dpm_2", "dpm2", {}),
        ("sample_lms", "lms", {}),
        ("sample_euler_ancestral", "euler_ancestral", {}),
    ],
)
def test_their_samplers_draw_what_ours_do(theirs: str, ours: str, options: dict[str, float]) -> None:
    sampling = pytest.importorskip("k_diffusion.sampling")
    if ours not in samplers.names():
        pytest.skip(f"no sampler {ours}")
    sigmas = sampling.get_sigmas_karras(10, 0.05, 20.0).double()
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    noises = torch.randn(20, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws, again = iter(noises), iter(noises)
    extra = {"noise_sampler": lambda *_: next(draws)} if "ancestral" in theirs else {}
    want = getattr(sampling, theirs)(model, x, sigmas, disable=True, **extra)
    sampler = samplers.create(ours, **options)
    denoise = k_diffusion.wrap(model)
    got = sampler.sample(denoise, x, EDM, sigmas=sigmas, noise=lambda: next(again))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

"""Our samplers inside diffusers' own pipelines: the pipeline's picture is ``sampler.sample``'s."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_pipelines import PROMPTS, diffusers, sd3, seeded, stable_diffusion

from imagen_kit import denoise_fn, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError
from imagen_kit.interop import diffusers as interop

DATA = analytic.problem("gmm2d")
#: Samplers whose formula is no tableau, or that change the state before asking the network.
UNFIT = {name for name in samplers.names() if not samplers.describe(name).get("linear", True)}
NAMES = sorted(set(samplers.names()) - UNFIT)
OPTIONS: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


def loop(
    scheduler: Any, x: torch.Tensor, network: Any, generator: Any = None, start: int = 0
) -> torch.Tensor:
    """What every pipeline does once ``set_timesteps`` has been called."""
    for t in scheduler.timesteps[start:]:
        answer = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(answer, t, x, generator=generator, return_dict=False)[0]
    return x


def eps_network(schedule: Any, scheduler: Any) -> Any:
    """The ideal noise predictor, told time as diffusers tells it."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return DATA.noise(x, *schedule.alpha_sigma(scheduler.trained.native(t)))

    return network


@pytest.mark.parametrize("name", NAMES)
def test_a_pipelines_loop_is_the_sampler(name: str) -> None:
    schedule = schedules.create("scaled_linear")
    sampler = samplers.create(name, **OPTIONS.get(name, {}))
    scheduler = interop.scheduler(sampler)
    scheduler.set_timesteps(7)
    tableau = sampler.tableau(schedule, 7)
    assert len(scheduler.timesteps) == tableau.nfe
    assert scheduler.num_inference_steps == 7
    assert scheduler.init_noise_sigma == tableau.prior_std
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = sampler.sample(DATA.denoise(schedule), x, schedule, 7, generator=torch.Generator().manual_seed(1))
    network = eps_network(schedule, scheduler)
    for _ in range(2):  # the second run needs no new set_timesteps
        got = loop(scheduler, x, network, torch.Generator().manual_seed(1))
        # The network is told float32 times, 3e-5 of a step off where they are not whole.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"spacing": "leading", "offset": 1}),
        ("dpmpp_2m", {"spacing": "trailing"}),
        ("heun", {"spacing": "linspace"}),
        ("dpmpp_3s", {"spacing": "trailing", "final": "sigma_min"}),
    ],
)
def test_whole_times_are_told_exactly(name: str, options: dict[str, Any]) -> None:
    schedule, sampler = schedules.create("scaled_linear"), samplers.create(name, **options)
    scheduler = interop.scheduler(name, **options)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.dtype == torch.int64
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = sampler.sample(DATA.denoise(schedule), x, schedule, 10)
    got = loop(scheduler, x, eps_network(schedule, scheduler))
    # noise to x0 divides by alpha, 0.07 at the start
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"spacing": "leading", "offset": 1}),
        ("dpmpp_2m", {"spacing": "karras"}),
        ("heun", {}),
        ("dpm_solver_3s", {}),
        ("euler_ancestral", {"spacing": "trailing"}),
        ("dpmpp_2m_sde", {"eta": 0.5}),
    ],
)
def test_stable_diffusion_pipeline(sd: Any, name: str, options: dict[str, Any]) -> None:
    sd.scheduler = interop.scheduler(name, like=sd.scheduler, **options)
    generator = torch.Generator().manual_seed(3)
    got = sd(
        PROMPTS, num_inference_steps=6, guidance_scale=3.0, output_type="latent", generator=generator,
        height=16, width=16,
    ).images  # fmt: skip

    text, empty = sd.encode_prompt(PROMPTS, "cpu", 1, True)
    schedule, prediction = interop.schedule(sd)
    denoise = denoise_fn(
        interop.denoiser(sd),
        schedule,
        prediction,
        cond=Cond(tokens=text),
        uncond=Cond(tokens=empty),
        guidance=3.0,
    )
    sampler, generator = samplers.create(name, **options), torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator) * sampler.tableau(schedule, 6).prior_std
    want = sampler.sample(denoise, x, schedule, 6, generator=generator)
    assert want.std() > 0.5
    # float32: the guided noise is a difference of predictions, and its error is divided by alpha = 0.07
    assert ((got - want).norm() / want.norm()).item() < 1e-4


def test_learned_bounds_come_from_the_config(tmp_path: Any) -> None:
    config = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "clip_sample": True,
        "clip_sample_range": 0.4,
    }
    scheduler = interop.scheduler("ddim", like=config)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 4)
    out = scheduler.step(torch.randn(2, 3, 4, 4), scheduler.timesteps[0], x)
    assert out.pred_original_sample.abs().max() == pytest.approx(0.4)
    pixels = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    theirs = diffusers.DDIMScheduler(clip_sample=False, **pixels)
    ours = interop.scheduler("ddim", like=theirs, spacing="leading")
    noise = torch.randn(2, 3, 4, 4)
    for each in (ours, theirs):
        each.set_timesteps(4)
    got = ours.step(noise, ours.timesteps[0], x)
    want = theirs.step(noise, theirs.timesteps[0], x, use_clipped_model_output=True)
    torch.testing.assert_close(
        got.pred_original_sample, want.pred_original_sample, rtol=1e-4, atol=1e-4
    )  # float32
    torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strength", "skipped"), [(0.5, 5), (0.25, 8)])
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim"])
def test_image_to_image_begins_inside_the_grid(
    tmp_path: Any, name: str, strength: float, skipped: int
) -> None:
    pipe = stable_diffusion(tmp_path, diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = interop.scheduler(name, like=pipe.scheduler)
    picture = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # latents: four channels
    got = pipe(
        PROMPTS[:1], image=picture, strength=strength, num_inference_steps=10, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip

    text, _ = pipe.encode_prompt(PROMPTS[:1], "cpu", 1, False)
    schedule, prediction = interop.schedule(pipe)
    denoise = denoise_fn(interop.denoiser(pipe), schedule, prediction, cond=Cond(tokens=text))
    sampler = samplers.create(name)
    times = sampler.tableau(schedule, 10).times[skipped:-1]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x = schedule.add_noise(picture, noise, torch.tensor(times[:1]))
    want = sampler.sample(denoise, x, schedule, timesteps=times)
    assert ((got - want).norm() / want.norm()).item() < 1e-4  # float32, and times told in it


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_flow_pipeline(tmp_path: Any, name: str, config: dict[str, Any]) -> None:
    pipe = sd3(tmp_path, **config)
    pipe.scheduler = interop.scheduler(name, like=pipe.scheduler)
    g = torch.Generator().manual_seed(0)
    text, pooled = torch.randn(2, 4, 32, generator=g), torch.randn(2, 64, generator=g)
    x = torch.randn(2, 4, 8, 8, generator=g)
    got = pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=0 * text,
        negative_pooled_prompt_embeds=0 * pooled, latents=x, num_inference_steps=5, guidance_scale=2.0,
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip

    schedule, prediction = interop.schedule(pipe)
    assert prediction == "flow"
    if "shift" not in config:  # 64 tokens of one pixel each: below the 256 that the line starts at
        schedule = interop.shifted(schedule, 0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256))
    denoise = denoise_fn(
        interop.denoiser(pipe), schedule, prediction, guidance=2.0,
        cond=Cond(tokens=text, pooled=pooled), uncond=Cond(tokens=0 * text, pooled=0 * pooled),
    )  # fmt: skip
    want = samplers.create(name).sample(denoise, x, schedule, 5)
    assert ((got - want).norm() / want.norm()).item() < 1e-5  # float32


def test_pixel_pipelines(tmp_path: Any) -> None:
    unet = seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    theirs = diffusers.DDPMScheduler()
    schedule, prediction = interop.schedule(theirs)
    denoise = denoise_fn(interop.denoiser(unet), schedule, prediction, clip=1.0)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for kind, name, steps in ((diffusers.DDPMPipeline, "ddpm", 8), (diffusers.DDIMPipeline, "dpmpp_2m", 5)):
        pipe = kind(unet, theirs)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = interop.scheduler(name, like=theirs)
        generator = torch.Generator().manual_seed(5)
        got = pipe(2, generator=generator, num_inference_steps=steps, output_type="np").images
        generator = torch.Generator().manual_seed(5)
        torch.randn(2, 3, 8, 8, generator=generator)
        want = samplers.create(name).sample(denoise, x, schedule, steps, generator=generator)
        want = (want / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-4)  # float32


@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_edm_networks_are_preconditioned_as_theirs(said: str) -> None:
    theirs = diffusers.EDMEulerScheduler(prediction_type=said, sigma_max=10.0)
    ours = interop.scheduler("euler", like=theirs, spacing="karras")
    for each in (theirs, ours):
        each.set_timesteps(6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    network = lambda x, t: (x * (1 + t)).sin()  # noqa: E731
    want = x.clone()
    for t in theirs.timesteps:
        want = theirs.step(network(theirs.scale_model_input(want, t), t), t, want).prev_sample
    torch.testing.assert_close(loop(ours, x, network), want, rtol=1e-4, atol=1e-4)  # float32 tables of theirs


def test_states_keep_their_precision_between_calls() -> None:
    schedule, sampler = schedules.create("scaled_linear"), samplers.create("dpmpp_2m", spacing="trailing")
    scheduler = interop.scheduler(sampler)
    scheduler.set_timesteps(20)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = loop(scheduler, x, eps_network(schedule, scheduler))
    denoise = denoise_fn(lambda x, t: DATA.noise(x, *schedule.alpha_sigma(t)), schedule)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, sampler.sample(denoise, x, schedule, 20), rtol=0, atol=0)


def test_what_a_pipeline_changes_between_calls_counts() -> None:
    scheduler = interop.scheduler("dpmpp_2m")
    scheduler.set_timesteps(3)
    x, first = torch.zeros(1, 2), scheduler.timesteps[0]
    state = scheduler.step(torch.ones(1, 2), first, x).prev_sample
    plain = [scheduler.step(torch.ones(1, 2), first, s).prev_sample for s in (state, state)]
    scheduler.set_timesteps(3)
    state = scheduler.step(torch.ones(1, 2), first, x).prev_sample
    state += 1.0
    assert (scheduler.step(torch.ones(1, 2), first, state).prev_sample - plain[0]).abs().min() > 0.1


def test_noise_is_added_as_the_schedule_says() -> None:
    scheduler = interop.scheduler("dpmpp_2m", like=diffusers.DDPMScheduler())
    theirs = diffusers.DDPMScheduler()
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        scheduler.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-5
    )
    flow = interop.scheduler("euler", like=diffusers.FlowMatchEulerDiscreteScheduler())
    flow.set_timesteps(4)
    sigma = flow.sigmas[1]
    got = flow.scale_noise(x, flow.timesteps[1:2], noise)
    torch.testing.assert_close(got, (1 - sigma) * x + sigma * noise)


def test_explicit_grids() -> None:
    scheduler = interop.scheduler("ddim")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([10.0, 1.0, 0.0]))
    flow = interop.scheduler("euler", like=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    flow.set_timesteps(sigmas=[0.9, 0.5])
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[0.9, 0.5])
    torch.testing.assert_close(flow.timesteps, theirs.timesteps)
    torch.testing.assert_close(flow.sigmas, theirs.sigmas)


def test_order_is_calls_a_step() -> None:
    assert [interop.scheduler(name).order for name in ("ddim", "heun", "dpmpp_3s")] == [1, 2, 1]


def test_config_is_kept_and_saved(sd: Any, tmp_path: Any) -> None:
    scheduler = interop.scheduler("dpmpp_2m", like=sd.scheduler, spacing="karras")
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config["prediction_type"] == "epsilon"
    assert len(scheduler) == 1000
    again = diffusers.DDIMScheduler.from_config(scheduler.config)  # and back to theirs
    assert again.config.beta_end == 0.012
    scheduler.save_pretrained(tmp_path)
    assert interop.schedule(diffusers.DDIMScheduler.from_pretrained(tmp_path).config)[1] == "eps"
    edm = interop.scheduler("euler", like=diffusers.EDMEulerScheduler())
    assert interop.schedule(dict(edm.config))[1] == interop.schedule(edm)[1] == "edm"


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: interop.scheduler("dpmp_2m"), "did you mean 'dpmpp_2m'"),
        (lambda: interop.scheduler("ddim", spacng="karras"), "no option 'spacng'; did you mean 'spacing'"),
        (lambda: interop.scheduler("ddim", prediction="epsilon"), "unknown prediction 'epsilon'"),
        (
            lambda: interop.scheduler("ddim", like=3),
            "expected a scheduler of diffusers or its config, not int",
        ),
        (lambda: interop.schedule({"beta_schedule": "linaer"}), "did you mean 'linear'"),
        (lambda: interop.schedule({"prediction_type": "v"}), "choose from epsilon, flow_prediction"),
        (lambda: interop.denoiser(torch.nn.Linear(1, 1)), "Linear is not a denoiser"),
        (lambda: interop.denoiser(object()), "expected a diffusers model, or a pipeline"),
    ],
)
def test_bad_input_is_told_in_one_line(build: Any, rule: str) -> None:
    with pytest.raises(KitError, match=rule) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_misuse_of_the_loop() -> None:
    scheduler, x = interop.scheduler("ddim"), torch.zeros(1, 2)
    with pytest.raises(KitError, match="call set_timesteps before step"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(KitError, match="time 3 is not one of timesteps"):
        scheduler.step(x, 3, x)
    with pytest.raises(KitError, match=r"eta=1\.0; make the scheduler with the option"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=1.0)
    with pytest.raises(KitError, match="mu shifts flow schedules only"):
        scheduler.set_timesteps(4, mu=1.0)
    heun = interop.scheduler("heun")
    heun.set_timesteps(4)
    heun.set_begin_index(3)
    with pytest.raises(KitError, match="cannot begin with call 3 of 7"):
        heun.step(x, heun.timesteps[3], x)


def test_without_diffusers_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(KitError, match=r"diffusers is not installed.*pip install 'imagen-kit\[diffusers\]'"):
        interop.scheduler("ddim")
    assert interop.schedule({"beta_schedule": "linear", "prediction_type": "sample"})[1] == "x0"

"""PixArt-α, Stable Diffusion 3, FLUX.1-dev and DiT: our recipes paint what the diffusers pipelines paint."""

from __future__ import annotations

import pytest
import torch
from parity_parts import (
    ATOL,
    CASES,
    CLASSES,
    SEEDS,
    SIDE,
    STEPS,
    TOLD,
    System,
    clip,
    clip_tokenizer,
    diffusers,
    generators,
    painter,
    quiet,
    randomised,
    small,
    t5,
    t5_tokenizer,
    vae,
)

from imagen_kit import recipe

# ---- PixArt-α ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixart")
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(4, 0.18215),
        transformer=randomised(
            lambda: diffusers.PixArtTransformer2DModel(
                sample_size=128,  # of the 1024 px model, which is told three numbers
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=24,
                caption_channels=24,
            )
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )
    quiet(pipe).save_pretrained(folder)
    part = {"name": "pixart", "learn_sigma": True, "width": 24, "depth": 2, "heads": 2, "sizes": True}
    stage = {"denoiser": part, "size": SIDE, "steps": STEPS}
    file = small("pixart-alpha", folder, [stage], told={"size": [SIDE, SIDE, 1]})
    return System(file, painter(pipe, 4.5, use_resolution_binning=False))


@pytest.mark.parametrize("case", CASES)
def test_pixart(pixart, case):
    assert pixart.difference(case) <= ATOL


def test_pixart_cleans_captions(pixart):
    pytest.importorskip("bs4")
    assert pixart.difference("from the web") <= ATOL
    assert pixart.difference("from the web", "text_encoder.lowercase=true") > TOLD


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder.lowercase=false",
        "text_encoder.max_length=100",
        "text_encoder.padding=attended",
        "stages.0.schedule=scaled_linear",
        "stages.0.sampler.closed=false",
        "stages.0.sampler.spacing=log_snr",
        "stages.0.sampler.kind=heun",
        "stages.0.guidance.0.scale=5",
        "stages.0.told.size=[64, 64, 0.5]",
    ],
)
def test_every_choice_of_pixart_tells(pixart, change):
    assert pixart.difference("two prompts away from two", change) > TOLD


# ---- Stable Diffusion 3 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=randomised(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=SIDE // 8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=12,
                num_attention_heads=2,
                joint_attention_dim=64,
                caption_projection_dim=24,
                pooled_projection_dim=56,
                pos_embed_max_size=8,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae(16, 1.5305, 0.0609, quant=False),
        text_encoder=clip(24, True, "quick_gelu", 1),
        text_encoder_2=clip(32, True, "gelu", 2),
        text_encoder_3=t5(64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        tokenizer_3=t5_tokenizer(),
    )
    quiet(pipe).save_pretrained(folder)
    part = {"name": "mmdit", "width": 24, "depth": 2, "heads": 2}
    file = small("sd3-medium", folder, [{"denoiser": part, "size": SIDE, "steps": STEPS}])
    return System(file, painter(pipe, 7.0))


@pytest.mark.parametrize("case", CASES)
def test_sd3(sd3, case):
    assert sd3.difference(case) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder.encoders.0.encoders.0.layer=last",
        "text_encoder.encoders.0.encoders.1.pooled=eos",
        "text_encoder.encoders.0.encoders.1.final_norm=true",
        "text_encoder.encoders.1.max_length=200",
        "text_encoder.encoders.1.padding=masked",
        "text_encoder.encoders.1.lowercase=true",
        "unconditional=zeros",
        "stages.0.schedule.shift=2",
        "stages.0.schedule.t_max=0.999",
        "stages.0.sampler.spacing=trailing",
        "stages.0.sampler.spacing=linspace",
        "stages.0.guidance.0.scale=6",
    ],
)
def test_every_choice_of_sd3_tells(sd3, change):
    assert sd3.difference("as shipped", change) > TOLD


# ---- FLUX.1-dev --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    # base and greatest shift are one: that of 1024 px at any size
    shift = {"use_dynamic_shifting": True, "base_shift": 1.15, "max_shift": 1.15}
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, **shift),
        vae=vae(16, 0.3611, 0.1159, quant=False),
        text_encoder=clip(24, False, "quick_gelu", 1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=randomised(
            lambda: diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=24,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            )
        ),
    )
    quiet(pipe).save_pretrained(folder)
    part = {"name": "flux", "width": 32, "depth": 1, "single_depth": 1, "heads": 2, "guidance": True}
    file = small("flux-dev", folder, [{"denoiser": part, "size": SIDE, "steps": STEPS}])

    def theirs(prompts, negative, guided, seeds):
        return painter(pipe, 3.5)(prompts, negative, True, seeds)  # the scale is told, and guides nothing

    return System(file, theirs)


@pytest.mark.parametrize("case", ["as shipped", "unguided"])
def test_flux(flux, case):
    assert flux.difference(case) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder.encoders.0.max_length=256",
        "text_encoder.encoders.0.padding=masked",
        "text_encoder.encoders.0.lowercase=true",
        "stages.0.schedule.shift=3.0",
        "stages.0.schedule.t_max=0.999",
        "stages.0.sampler.spacing=sd3",
        "stages.0.told.guidance=4.0",
    ],
)
def test_every_choice_of_flux_tells(flux, change):
    assert flux.difference("as shipped", change) > TOLD


# ---- DiT ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    pipe = diffusers.DiTPipeline(
        transformer=randomised(
            lambda: diffusers.DiTTransformer2DModel(
                sample_size=SIDE // 8,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=8,
                num_embeds_ada_norm=1000,
                norm_num_groups=8,
            )
        ),
        vae=vae(4, 0.18215),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
    )
    quiet(pipe).save_pretrained(folder)
    part = {"name": "dit", "learn_sigma": True, "width": 24, "depth": 2, "heads": 2}
    file = small("dit-xl-2-256", folder, [{"denoiser": part, "size": SIDE, "steps": STEPS}])
    return System(file, ancestral(pipe)), pipe


def ancestral(pipe):
    """The authors' sampling: the learned variance is kept, and three of four channels are guided."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )

    @torch.no_grad()
    def theirs(prompts, negative, guided, seeds):
        noise = generators(seeds)
        x = torch.stack([torch.randn(4, SIDE // 8, SIDE // 8, generator=one) for one in noise])
        classes = torch.tensor([int(prompt) for prompt in prompts])
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            both = torch.cat([classes, torch.full_like(classes, 1000)])
            answer = pipe.transformer(x.repeat(2, 1, 1, 1), t.expand(len(both)), class_labels=both).sample
            said, null = answer.chunk(2)
            if guided:
                eps = null[:, :3] + 1.5 * (said[:, :3] - null[:, :3])
                said = torch.cat([eps, said[:, 3:]], dim=1)
            x = scheduler.step(said, t, x, generator=noise).prev_sample
        return pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.div(2).add(0.5).clamp(0, 1)

    return theirs


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_dit_by_the_pipeline(dit, scale):
    """DiTPipeline drops the learned variance and guides all four channels; its scheduler is DDIM."""
    system, pipe = dit
    wanted = pipe(
        [207, 88],
        guidance_scale=scale,
        generator=generators(SEEDS),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    guidance = [{"name": "cfg", "scale": scale}]
    found = system.ours(["207", "macaw"], seed=SEEDS, sampler="DDIMScheduler", steps=STEPS, guidance=guidance)
    assert wanted.std() > 0.03
    assert (found.tensor - wanted).abs().max() <= ATOL


def test_dit_512_is_sampled_as_256_is():
    small, large = (recipe.load(f"dit-xl-2-{side}").stages[0].model_dump() for side in (256, 512))
    sizes = {"size", "weights", "codec"}
    assert {key: small[key] for key in small.keys() - sizes} == {
        key: large[key] for key in large.keys() - sizes
    }


@pytest.mark.parametrize("case", CLASSES)
def test_dit_as_its_authors_sample(dit, case):
    assert dit[0].difference(case) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "labels.null=false;stages.0.guidance=[]",
        "stages.0.guidance.0.channels=null",
        "stages.0.guidance.0.scale=1.6",
        "stages.0.sampler.variance=fixed_small",
        "stages.0.sampler.variance=fixed_large",
        "stages.0.sampler.spacing=leading",
        "stages.0.schedule=scaled_linear",
    ],
)
def test_every_choice_of_dit_tells(dit, change):
    assert dit[0].difference("classes", *change.split(";")) > TOLD

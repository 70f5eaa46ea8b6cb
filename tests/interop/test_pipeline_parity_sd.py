"""Stable Diffusion 1.5 and XL: our recipes paint what the diffusers pipelines paint."""

from __future__ import annotations

import pytest
from parity_parts import (
    ATOL,
    CASES,
    SIDE,
    STEPS,
    TOLD,
    System,
    clip,
    clip_tokenizer,
    diffusers,
    painter,
    quiet,
    randomised,
    small,
    vae,
)

SCHEDULER = {  # of the published repositories
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def denoiser(**more):
    """The tiny U-Net as a recipe would describe it; its details are the checkpoint's."""
    level = {"channels": 16, "attention": {"kind": "transformer", "head_dim": 8}}
    style = {"modulation": "shift", "resample": "conv", "groups": 8}
    return {"name": "adm", "style": style, "levels": [level, level], **more}


def unet(width: int, **more):
    return randomised(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=SIDE // 8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=2,
            norm_num_groups=8,
            **more,
        )
    )


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(4, 0.18215),
        text_encoder=clip(24, False, "quick_gelu", 1),
        tokenizer=clip_tokenizer(),
        unet=unet(24),
        scheduler=diffusers.PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    quiet(pipe).save_pretrained(folder)
    file = small("sd15", folder, [{"denoiser": denoiser(), "size": SIDE, "steps": STEPS}])
    return System(file, painter(pipe, 7.5))


@pytest.mark.parametrize("case", CASES)
def test_sd15(sd15, case):
    assert sd15.difference(case) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder.padding=masked",
        "text_encoder.layer=penultimate",
        "text_encoder.final_norm=false;text_encoder.layer=penultimate",
        "stages.0.schedule=linear",
        "stages.0.prediction=v",
        "stages.0.sampler.name=ddim",
        "stages.0.sampler.spacing=trailing",
        "stages.0.sampler.offset=2",
        "stages.0.sampler.final=zero",
        "stages.0.sampler.closed=true",
        "stages.0.guidance.0.scale=7",
    ],
)
def test_every_choice_of_sd15_tells(sd15, change):
    assert sd15.difference("two prompts away from two", *change.split(";")) > TOLD


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    numbers = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "use_linear_projection": True,
    }
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(4, 0.13025),
        text_encoder=clip(24, False, "quick_gelu", 1),
        text_encoder_2=clip(32, True, "gelu", 2),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=unet(56, **numbers),
        scheduler=diffusers.EulerDiscreteScheduler.from_config({**SCHEDULER, "timestep_spacing": "leading"}),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    quiet(pipe).save_pretrained(folder)
    part = denoiser(embedding={"size_numbers": 6})
    file = small("sdxl", folder, [{"denoiser": part, "size": SIDE, "steps": STEPS}])
    sizes = {"original_size": (1024, 1024), "target_size": (1024, 1024)}  # what the recipe tells
    return System(file, painter(pipe, 5.0, **sizes))


@pytest.mark.parametrize("case", CASES)
def test_sdxl(sdxl, case):
    assert sdxl.difference(case) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "unconditional=empty",
        "text_encoder.encoders.0.padding=masked",
        "text_encoder.encoders.0.layer=last",
        "text_encoder.encoders.0.final_norm=true",
        "text_encoder.encoders.1.final_norm=true",
        "text_encoder.encoders.1.pooled=eos",
        "stages.0.sampler.offset=0",
        "stages.0.sampler.spacing=linspace",
        "stages.0.guidance.0.scale=5.5",
        "stages.0.told.size=[1024, 1024, 0, 0, 512, 512]",
    ],
)
def test_every_choice_of_sdxl_tells(sdxl, change):
    assert sdxl.difference("as shipped", change) > TOLD

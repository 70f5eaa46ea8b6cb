"""DeepFloyd IF: stages I and II of our recipe paint what the diffusers pipelines paint, from the same noise."""

from __future__ import annotations

import pytest
from parity_parts import (
    ATOL,
    CASES,
    TOLD,
    System,
    diffusers,
    generators,
    quiet,
    randomised,
    respaced,
    small,
    t5,
    t5_tokenizer,
)

STEPS, SIDES = 10, (16, 32)
SMART50, FOUR = tuple(respaced.smart50_timesteps), (750, 500, 250, 0)  # of stage II
# a long step from time 999, where x0 is 20,000 times the prediction, would carry its rounding into the picture
QUICK = ("stages.1.sampler.spacing=leading", "stages.1.sampler.steps=4")
SCHEDULER = {  # of the published repositories
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "thresholding": True,
    "variance_type": "learned_range",
}


def denoiser():
    """The tiny U-Net as a recipe would describe it; its details are the checkpoint's."""
    style = {"activation": "gelu", "resample": "residual", "groups": 4}
    levels = [{"channels": 8}, {"channels": 16, "attention": {"head_dim": 4}}]
    embedding = {"text_width": 32, "text_heads": 2}
    return {"name": "adm", "out_channels": 6, "style": style, "levels": levels, "embedding": embedding}


def unet(side: int, second: bool):
    more = {}
    if second:
        more = {
            "class_embed_type": "timestep",
            "time_embedding_act_fn": "gelu",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1 / 0.7071,
            "mid_block_scale_factor": 1 / 0.7071,
            "only_cross_attention": True,
        }
    return randomised(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=side,
            in_channels=6 if second else 3,
            out_channels=6,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            attention_head_dim=4,
            encoder_hid_dim=24,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=4,
            **more,
        ),
        seed=int(second),
        gain=0.35,  # sixty steps of a wilder network would make rounding visible
    )


def scheduler(largest: float, spacing: str = "leading"):
    return diffusers.DDPMScheduler(**SCHEDULER, sample_max_value=largest, timestep_spacing=spacing)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if")
    rest = {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    words = {"tokenizer": t5_tokenizer(), "text_encoder": t5()}
    first = diffusers.IFPipeline(
        unet=unet(SIDES[0], False), scheduler=scheduler(1.5, "linspace"), **words, **rest
    )
    second = diffusers.IFSuperResolutionPipeline(
        unet=unet(SIDES[1], True),
        scheduler=scheduler(1.0),
        image_noising_scheduler=scheduler(1.0),
        **words,
        **rest,
    )
    for i, pipe in enumerate((first, second)):
        quiet(pipe).save_pretrained(folder / str(i))
    steps = (STEPS, len(SMART50))
    stages = [
        {"denoiser": denoiser(), "size": side, "steps": count}
        for side, count in zip(SIDES, steps, strict=True)
    ]
    file = small("deepfloyd-if", folder, stages)
    return {times: System(file, painter(first, second, list(times))) for times in (SMART50, FOUR)}


def painter(first, second, times):
    """Stage after stage, in the pipelines' own range: [-1, 1]."""

    def theirs(prompts, negative, guided, seeds):
        common = {"prompt": prompts, "negative_prompt": negative, "output_type": "pt"}
        tiny = first(
            num_inference_steps=STEPS,
            generator=generators(seeds),
            guidance_scale=7.0 if guided else 1.0,
            **common,
        ).images
        large = second(
            image=tiny,
            timesteps=times,
            generator=generators(seeds, stage=1),
            guidance_scale=4.0 if guided else 1.0,
            noise_level=250,
            **common,
        ).images
        return large.add(1).div(2)

    return theirs


@pytest.mark.parametrize("case", CASES)
def test_cascade(cascade, case):
    """Both stages: what differs in the first would show in the second."""
    assert cascade[SMART50].difference(case) <= ATOL


def test_captions_are_cleaned(cascade):
    pytest.importorskip("bs4")
    assert cascade[FOUR].difference("from the web", *QUICK) <= ATOL
    assert cascade[FOUR].difference("from the web", *QUICK, "text_encoder.lowercase=true") > TOLD


def test_a_quick_second_stage(cascade):
    """What the changes below are changes of."""
    assert cascade[FOUR].difference("as shipped", *QUICK) <= ATOL


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder.lowercase=false",
        "text_encoder.padding=masked",
        "text_encoder.max_length=64",
        "unconditional=zeros",
        "stages.0.schedule.timesteps=500",
        "stages.0.sampler.spacing=leading",
        "stages.0.sampler.variance=fixed_large",
        "stages.0.guidance.0.scale=6",
        "stages.0.guidance.1.percentile=0.9",
        "stages.0.guidance.1.cap=1.2",
        "stages.1.low_res_level=0.24",
        "stages.1.low_res.align_corners=false",
        "stages.1.low_res.schedule=null",
        "stages.1.sampler.spacing=linspace",
        "stages.1.sampler.variance=fixed_large",
        "stages.1.guidance.0.scale=5",
        "stages.1.guidance.1.cap=1.5",
    ],
)
def test_every_choice_tells(cascade, change):
    assert cascade[FOUR].difference("as shipped", *QUICK, change) > TOLD

"""Stage III of deepfloyd-if against StableDiffusionUpscalePipeline: same weights, same noise, same picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as upscale
from diffusers.schedulers import scheduling_ddpm
from tiny_pipelines import clip, seeded, tokenizer
from transformers import CLIPTextModel

from imagen_kit import recipe
from imagen_kit.pipeline import Pipeline, derive_seed

PROMPTS, SEEDS = ["a red star", "two blue rings"], [3, 4]
LEVELS = "[{channels: 32}]"
STEPS = 4
NOISE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}  # the published configs'


def unet() -> Any:
    """The upscaler in small: both kinds of transformer, labels, seven channels in."""
    return diffusers.UNet2DConditionModel(
        in_channels=7,
        sample_size=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, True, False),
        num_class_embeds=1000,
        use_linear_projection=True,
        cross_attention_dim=64,  # of the kit's tiny CLIP
        attention_head_dim=8,
        norm_num_groups=8,
    )


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.08333,
        layers_per_block=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("upscaler")
    for name, build in (("unet", unet), ("vae", vae)):
        seeded(build).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def system(folder: Any) -> Pipeline:
    tiny = f"{{name: adm, out_channels: 6, levels: {LEVELS}"
    attention = "{kind: transformer, heads: 8, cells: false}"
    levels = (
        f"style: {{resample: conv}}, levels: [{{channels: 32}}, {{channels: 32, attention: {attention}}}]"
    )
    changes = [
        *("text_encoder.weights=random", "text_encoder.size=tiny"),
        f"stages.0.denoiser={tiny}}}",
        *("stages.0.weights=random", "stages.0.size=4", "stages.0.sampler.steps=1"),
        f"stages.1.denoiser={tiny}}}",
        *("stages.1.weights=random", "stages.1.size=8"),
        "stages.1.sampler={name: ddpm, variance: learned_range, steps: 1}",
        "stages.2.text_encoder={name: clip, size: tiny, pooled: null, padding: attended}",
        f"stages.2.denoiser={{name: adm, num_classes: 1000, embedding: {{low_res_noised: false}}, {levels}}}",
        f"stages.2.codec={{name: kl, widths: [32, 32, 32], blocks: 1, weights: {folder / 'vae'}}}",
        *(f"stages.2.weights={folder / 'unet'}", "stages.2.size=32", f"stages.2.sampler.steps={STEPS}"),
    ]
    return recipe.load("deepfloyd-if", changes).build()


def test_the_picture_is_the_published_pipelines(folder: Any, system: Pipeline, monkeypatch: Any) -> None:
    ours = system(PROMPTS, seed=SEEDS).tensor
    before = Pipeline(system.text_encoder, system.stages[:2])(PROMPTS, seed=SEEDS).tensor
    draws = [torch.Generator().manual_seed(derive_seed(seed, 2)) for seed in SEEDS]

    def draw(channels: int) -> torch.Tensor:
        return torch.stack([torch.randn(channels, 8, 8, generator=g) for g in draws])

    latents, noise = draw(4), draw(3)
    rest = iter([draw(4) for _ in range(STEPS)])  # the last is multiplied by 1e-10
    monkeypatch.setattr(upscale, "randn_tensor", lambda *a, **k: noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: next(rest))
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        text_encoder=CLIPTextModel(clip()),  # not called: embeddings are given
        tokenizer=tokenizer(folder / "tokenizer"),
        low_res_scheduler=diffusers.DDPMScheduler(**NOISE),
        scheduler=diffusers.DDPMScheduler(
            **NOISE,
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    encoder = system.stages[2].text_encoder
    theirs = pipe(
        image=before * 2 - 1,
        num_inference_steps=STEPS,
        guidance_scale=9.0,
        noise_level=20,
        latents=latents,
        prompt_embeds=encoder(PROMPTS).tokens,
        negative_prompt_embeds=encoder(["", ""]).tokens,
        output_type="pt",
    ).images
    assert theirs.shape == (2, 3, 32, 32)
    assert theirs.std() > 0.05  # neither flat nor saturated
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("change", [{"low_res_level": 0.3}, {"text_encoder": None}])
def test_the_noise_level_and_the_text_are_the_stages_own(system: Pipeline, change: dict[str, Any]) -> None:
    stages, picture = system.stages, system("a red star", seed=1).tensor
    other = Pipeline(system.text_encoder, [*stages[:2], replace(stages[2], **change)])
    assert not torch.allclose(other("a red star", seed=1).tensor, picture, atol=1e-3)

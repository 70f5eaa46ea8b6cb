"""Pipelines of diffusers with networks of a few thousand random weights."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import transformers

PROMPTS = ["a red star", "two blue rings"]


def seeded(build: Any, seed: int = 0) -> Any:
    """A module with weights that are random everywhere: layers that start at zero would hide faults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for p in module.parameters():
                if not p.any():
                    p.normal_(std=0.05)
    return module.eval().requires_grad_(False)


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows letters only."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def clip(**config: Any) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **config,
    )


@cache
def unet(sdxl: bool = False) -> Any:
    extra: dict[str, Any] = {}
    if sdxl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 58,
        }
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
            **extra,
        )
    )


@cache
def vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip


def stable_diffusion(folder: Path, kind: Any = None, **config: Any) -> Any:
    """StableDiffusionPipeline, or another ``kind`` with the same parts."""
    kind = kind or diffusers.StableDiffusionPipeline
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        **config,
    )
    pipe = kind(
        vae=vae(),
        text_encoder=seeded(lambda: transformers.CLIPTextModel(clip())),
        tokenizer=tokenizer(folder),
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def sd3_transformer() -> Any:
    return seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
            pos_embed_max_size=8,
        )
    )  # fmt: skip


def sd3(folder: Path, **config: Any) -> Any:
    """StableDiffusion3Pipeline without its encoders: embeddings are given."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**config),
        vae=vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe

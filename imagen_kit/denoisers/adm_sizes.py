"""Published sizes of ``adm``: ADM, DeepFloyd IF, Stable Diffusion, DDPM, each with its sampling defaults.

Widths are those of the released checkpoints. IF-II-M was released without a config that can be read: it loads from
its file, whose shapes tell, but has no name here. IF-III was never released; its authors use ``sd_x4_unet`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagen_kit.denoisers import register
from imagen_kit.denoisers.adm import ADM

Runtime = Mapping[str, bool] | None
IF_STYLE = {"activation": "gelu", "resample": "residual", "groups": 32}
SD_STYLE = {"modulation": "shift", "resample": "conv", "groups": 32}
DDPM_STYLE = {"modulation": "shift", "resample": "asymmetric", "groups": 32, "eps": 1e-6}


def _sampling(schedule: Mapping[str, Any], prediction: str = "eps", **more: Any) -> dict[str, Any]:
    return {"sampling": {"schedule": {**schedule, "timesteps": 1000}, "prediction": prediction, **more}}


def _learned(schedule: str, **more: Any) -> dict[str, Any]:
    """Of a network that learned its variance: half of its output channels."""
    return _sampling({"name": schedule}, variance="learned_range", sampler="ddpm", **more)


def _latent(**more: Any) -> dict[str, Any]:
    return _sampling({"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, **more)


def levels(
    widths: Sequence[int],
    blocks: int | Sequence[int],
    attention: Mapping[int, Mapping[str, Any]],
    dropout: float = 0.0,
) -> list[dict[str, Any]]:
    """Level specs: ``attention`` maps the number of a level (0 the finest) to the attention there."""
    counts = [blocks] * len(widths) if isinstance(blocks, int) else blocks
    return [
        {"channels": c, "blocks": n, "attention": attention.get(i, False), "dropout": dropout}
        for i, (c, n) in enumerate(zip(widths, counts, strict=True))
    ]


def _last(count: int, of: int, **attention: Any) -> dict[int, dict[str, Any]]:
    """The same attention at the ``count`` coarsest of ``of`` levels."""
    return dict.fromkeys(range(of - count, of), attention)


@register("adm_64", **_learned("cosine", steps=250, classifier_scale=1.0))
def adm_64(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM for ImageNet 64², class-conditional: 296 M parameters."""
    spec = levels((192, 384, 576, 768), 3, _last(3, 4, head_dim=64), dropout=0.1)
    return ADM(3, 6, spec, num_classes=1000, time_scale=time_scale, runtime=runtime)


@register("adm_128", **_learned("linear", steps=250, classifier_scale=0.5))
def adm_128(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM for ImageNet 128², class-conditional: 422 M parameters."""
    spec = levels((256, 256, 512, 768, 1024), 2, _last(3, 5, heads=4))
    return ADM(3, 6, spec, num_classes=1000, time_scale=time_scale, runtime=runtime)


@register("adm_256", **_learned("linear", steps=250, classifier_scale=1.0))
def adm_256(num_classes: int | None = 1000, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM for ImageNet 256²: 554 M parameters; with ``num_classes`` None the unconditional one (and LSUN's)."""
    spec = levels((256, 256, 512, 512, 1024, 1024), 2, _last(3, 6, head_dim=64))
    return ADM(3, 6, spec, num_classes=num_classes, time_scale=time_scale, runtime=runtime)


@register("adm_512", **_learned("linear", steps=250, classifier_scale=4.0))
def adm_512(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM for ImageNet 512², class-conditional: 559 M parameters."""
    spec = levels((128, 256, 256, 512, 512, 1024, 1024), 2, _last(3, 7, head_dim=64))
    embedding = {"dim": 1024, "frequencies": 256}  # of the base width 256, which the first level halves
    return ADM(3, 6, spec, embedding=embedding, num_classes=1000, time_scale=time_scale, runtime=runtime)


@register("adm_64_to_256", **_learned("linear", steps=250, low_res="bilinear"))
def adm_64_to_256(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM's 64² → 256² up-sampler, class-conditional: 312 M parameters."""
    spec = levels((192, 192, 384, 384, 768, 768), 2, _last(3, 6, heads=4))
    return ADM(3, 6, spec, **_upsampler, time_scale=time_scale, runtime=runtime)


@register("adm_128_to_512", **_learned("linear", steps=250, low_res="bilinear"))
def adm_128_to_512(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """ADM's 128² → 512² up-sampler, class-conditional: 309 M parameters."""
    spec = levels((192, 192, 384, 384, 768, 768), 2, _last(2, 6, head_dim=64))
    return ADM(3, 6, spec, **_upsampler, time_scale=time_scale, runtime=runtime)


_upsampler: dict[str, Any] = {
    "embedding": {"low_res_noised": False},
    "num_classes": 1000,
    "low_res_channels": 3,
}


def _if_i(width: int, context_dim: int, time_scale: float, runtime: Runtime) -> ADM:
    widths = [width * i for i in (1, 2, 3, 4)]
    embedding = {"dim": widths[-1], "text_width": widths[-1]}
    return ADM(
        *(3, 6, levels(widths, 3, _last(3, 4, head_dim=64)), None, IF_STYLE, embedding, context_dim),
        time_scale=time_scale,
        runtime=runtime,
    )


@register("if_i_m", **_learned("cosine", steps=150, guidance=7.0))
def if_i_m(context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DeepFloyd IF-I-M, text → 64²: 372 M parameters."""
    return _if_i(192, context_dim, time_scale, runtime)


@register("if_i_l", **_learned("cosine", steps=150, guidance=7.0))
def if_i_l(context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DeepFloyd IF-I-L, text → 64²: 935 M parameters."""
    return _if_i(320, context_dim, time_scale, runtime)


@register("if_i_xl", **_learned("cosine", steps=150, guidance=7.0))
def if_i_xl(context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DeepFloyd IF-I-XL, text → 64²: 4.3 B parameters."""
    return _if_i(704, context_dim, time_scale, runtime)


@register("if_ii_l", **_learned("cosine", steps=50, guidance=4.0, low_res_level=0.25))
def if_ii_l(context_dim: int = 4096, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DeepFloyd IF-II-L, text and 64² → 256²: 1.18 B parameters (published as 1.2 B)."""
    # The released stage II attends to the text alone: its files hold no self-attention keys. With them it would
    # count 1.24 B, which rounds to the same.
    spec = levels((160, 320, 640, 960, 1280), (2, 2, 3, 5, 5), _last(2, 5, head_dim=64, cells=False))
    style = {**IF_STYLE, "skip_scale": 0.7071}
    embedding = {"dim": 1280, "text_width": 1280}
    return ADM(
        *(3, 6, spec, None, style, embedding, context_dim),
        low_res_channels=3,
        time_scale=time_scale,
        runtime=runtime,
    )


@register("sd15_unet", **_latent(sampler="plms", steps=50, guidance=7.5))
def sd15_unet(context_dim: int = 768, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """Stable Diffusion 1.x, latents of 512²: 860 M parameters."""
    attention = {"kind": "transformer", "heads": 8}
    spec = levels((320, 640, 1280, 1280), 2, {0: attention, 1: attention, 2: attention})
    return ADM(*(4, 4, spec, attention, SD_STYLE, None, context_dim), time_scale=time_scale, runtime=runtime)


@register("sd21_unet", **_latent(prediction="v", sampler="ddim", steps=50, guidance=7.5))
def sd21_unet(context_dim: int = 1024, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """Stable Diffusion 2.x, latents of 768² (the "base" models of 512² predict eps): 866 M parameters."""
    attention = {"kind": "transformer", "head_dim": 64}
    spec = levels((320, 640, 1280, 1280), 2, {0: attention, 1: attention, 2: attention})
    return ADM(*(4, 4, spec, attention, SD_STYLE, None, context_dim), time_scale=time_scale, runtime=runtime)


@register(
    "sd_x4_unet",
    **_sampling(
        {"name": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02},
        *("v",),
        sampler="ddim",
        steps=75,
        guidance=9.0,
        low_res_level=0.02,
    ),
)
def sd_x4_unet(context_dim: int = 1024, time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """Stable Diffusion's 4× upscaler, latents of side s joined with an RGB picture of side s → 4s: 473 M parameters.

    Its labels are the steps of the noise on that picture, of 1000 (see ``imagen_kit.cascade.LowRes``).
    """
    alone, whole = ({"kind": "transformer", "heads": 8, "cells": cells} for cells in (False, True))
    return ADM(
        *(4, 4, levels((256, 512, 512, 1024), 2, {1: alone, 2: alone, 3: whole}), None, SD_STYLE),
        embedding={"low_res_noised": False},
        context_dim=context_dim,
        num_classes=1000,
        low_res_channels=3,
        time_scale=time_scale,
        runtime=runtime,
    )


@register("sdxl_unet", **_latent(sampler="euler", steps=50, guidance=5.0))
def sdxl_unet(
    context_dim: int = 2048, pooled_dim: int = 1280, time_scale: float = 1.0, runtime: Runtime = None
) -> ADM:
    """SDXL base, latents of 1024²: 2.6 B parameters."""
    attention = {depth: {"kind": "transformer", "head_dim": 64, "depth": depth} for depth in (2, 10)}
    return ADM(
        *(4, 4, levels((320, 640, 1280), 2, {1: attention[2], 2: attention[10]}), None, SD_STYLE),
        embedding={"size_numbers": 6},
        context_dim=context_dim,
        pooled_dim=pooled_dim,
        time_scale=time_scale,
        runtime=runtime,
    )


def _ddpm(widths: Sequence[int], attended: int, time_scale: float, runtime: Runtime) -> ADM:
    one = {"heads": 1}
    embedding = {"shift": 1.0, "sin_first": True}
    return ADM(
        *(3, 3, levels(widths, 2, {attended: one}), one, DDPM_STYLE, embedding),
        time_scale=time_scale,
        runtime=runtime,
    )


@register("ddpm_32", **_sampling({"name": "linear"}, sampler="ddpm", steps=1000))
def ddpm_32(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DDPM for CIFAR-10, 32²: 36 M parameters."""
    return _ddpm((128, 256, 256, 256), 1, time_scale, runtime)


@register("ddpm_256", **_sampling({"name": "linear"}, sampler="ddpm", steps=1000))
def ddpm_256(time_scale: float = 1.0, runtime: Runtime = None) -> ADM:
    """DDPM for CelebA-HQ and LSUN, 256²: 114 M parameters."""
    return _ddpm((128, 128, 256, 256, 512, 512), 4, time_scale, runtime)

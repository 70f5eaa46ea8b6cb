"""Published recipes in small, as changes to them: every part is there, and a run takes a moment."""

from __future__ import annotations

KL = "{name: kl, widths: [32, 32, 32, 32], blocks: 1}"
CLIP = "{name: clip, size: tiny, pooled: null, padding: attended}"
DIT = "{name: dit, learn_sigma: true, width: 32, depth: 2, heads: 2}"


def transformer(context):
    """Levels of a tiny Stable Diffusion."""
    kind = "{kind: transformer, head_dim: 32}"
    return (
        "{name: adm, style: {modulation: shift, resample: conv, groups: 32}, "
        f"levels: [{{channels: 32}}, {{channels: 32, attention: {kind}}}]{context}}}"
    )


def tiny_if(more):
    levels = "[{channels: 64}, {channels: 64, attention: {head_dim: 32}}]"
    told = "{text_width: 64, text_heads: 4}"
    return (
        "{name: adm, out_channels: 6, style: {activation: gelu, resample: residual, groups: 32}, "
        f"levels: {levels}, embedding: {told}{more}}}"
    )


SMALL = {
    "dit-xl-2-256": [f"stages.0.denoiser={DIT}", f"stages.0.codec={KL}", "stages.0.size=64"],
    "dit-xl-2-512": [f"stages.0.denoiser={DIT}", f"stages.0.codec={KL}", "stages.0.size=64"],
    "adm-256": [
        "stages.0.denoiser={name: adm, out_channels: 6, levels: [{channels: 32}]}",
        "stages.0.networks.classifier.denoiser={name: adm_classifier, levels: [{channels: 32}], head_dim: 32}",
        "stages.0.networks.classifier.weights=random",
        "stages.0.size=8",
    ],
    "sd15": [
        f"text_encoder={CLIP}",
        f"stages.0.denoiser={transformer('')}",
        f"stages.0.codec={KL}",
        "stages.0.size=64",
    ],
    "sdxl": [
        "text_encoder.encoders.0.weights=random",
        "text_encoder.encoders.0.size=tiny",
        "text_encoder.encoders.1.weights=random",
        "text_encoder.encoders.1.size=tiny",
        f"stages.0.denoiser={transformer(', embedding: {size_numbers: 6}')}",
        f"stages.0.codec={KL}",
        "stages.0.size=64",
    ],
    "pixart-alpha": [
        "text_encoder.weights=random",
        "text_encoder.size=tiny",
        "stages.0.denoiser={name: pixart, learn_sigma: true, width: 48, depth: 1, heads: 2, sizes: true}",
        f"stages.0.codec={KL}",
        "stages.0.size=64",
    ],
    "sd3-medium": [
        *(f"text_encoder.encoders.0.encoders.{i}.weights=random" for i in (0, 1)),
        *(f"text_encoder.encoders.0.encoders.{i}.size=tiny" for i in (0, 1)),
        "text_encoder.encoders.1.weights=random",
        "text_encoder.encoders.1.size=tiny",
        "stages.0.denoiser={name: mmdit, width: 32, depth: 2, heads: 2}",
        f"stages.0.codec={KL}",
        "stages.0.size=64",
    ],
    "flux-dev": [
        *(f"text_encoder.encoders.{i}.weights=random" for i in (0, 1)),
        *(f"text_encoder.encoders.{i}.size=tiny" for i in (0, 1)),
        "stages.0.denoiser={name: flux, width: 32, depth: 1, single_depth: 1, heads: 2, guidance: true}",
        f"stages.0.codec={KL}",
        "stages.0.size=64",
    ],
    "deepfloyd-if": [
        "text_encoder.weights=random",
        "text_encoder.size=tiny",
        f"stages.0.denoiser={tiny_if('')}",
        "stages.0.size=8",
        f"stages.1.denoiser={tiny_if('')}",
        "stages.1.weights=random",
        "stages.1.size=16",
        "stages.1.sampler={name: ddpm, variance: learned_range, steps: 2}",
        "stages.2.text_encoder.weights=random",
        "stages.2.text_encoder.size=tiny",
        f"stages.2.denoiser={transformer(', num_classes: 1000, embedding: {low_res_noised: false}')}",
        "stages.2.weights=random",
        "stages.2.codec={name: kl, widths: [32, 32, 32], blocks: 1}",
        "stages.2.size=64",
        "stages.2.sampler.steps=2",
    ],
}

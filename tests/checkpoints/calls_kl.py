"""How fixtures of KL autoencoders are run; the references answer unscaled latents, except for FLUX's own code."""

from __future__ import annotations

import torch


def official(module, inputs, config, meta):
    mean, std = module.moments(inputs["image"])
    return {
        "moments": torch.cat([mean, 2 * std.log()], dim=1),
        "encode_mode_scaled": module.encode(inputs["image"]),
        "decode": module.decode(inputs["latents"]),
    }


def diffusers(module, inputs, config, meta):
    def scaled(z):
        return module.scale * (z - module.shift)

    mean, std = module.moments(inputs["image"])
    return {
        "moments": torch.cat([mean, 2 * std.log()], dim=1),
        "mean": mean,
        "std": std,
        "decode": module.decode(scaled(inputs["latents"])),
        "reconstruct_mode": module(inputs["image"]),
    }


CALLS = {"kl_official": official, "kl_diffusers": diffusers}

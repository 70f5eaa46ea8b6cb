"""How EDM2 fixtures are run."""

from __future__ import annotations

import torch

from imagen_kit.conditioning import Cond
from imagen_kit.prediction import coefficients, network_input


def official(module, inputs, config, meta):
    x, sigma, classes = inputs["x"], inputs["sigma"].double(), inputs["class_labels"]
    labels = Cond(labels=classes.argmax(1))
    nothing = Cond(labels=torch.full((len(x),), classes.shape[1]))
    out = {"unet": module(x, inputs["c_noise"], labels)}
    alpha = torch.ones_like(sigma)
    scaled, time = network_input("edm", x, sigma, alpha, sigma)
    a, b = (c[:, None, None, None] for c in coefficients("edm", alpha, sigma))
    for name, cond in (("denoised", labels), ("denoised_uncond", nothing)):
        out[name] = (a * x + b * module(scaled, time.float(), cond)).float()
    out["logvar"] = module.logvar(time.float())[:, None, None, None]
    return out


CALLS = {"edm2_precond_official": official}

"""How fixtures of the published U-Nets are run."""

from __future__ import annotations

import json

from torch.nn import functional as F

from imagen_kit import schedules
from imagen_kit.cascade import LowRes
from imagen_kit.conditioning import Cond


def adm(module, inputs, config, meta):
    low = inputs.get("low_res")
    if low is not None:  # as the official up-sampler does
        low = F.interpolate(low, inputs["x"].shape[-2:], mode="bilinear")
    return {"forward": module(inputs["x"], inputs["timesteps"], Cond(labels=inputs.get("y"), low_res=low))}


def if_official(module, inputs, config, meta):
    """Stage II noises its low-resolution input itself, at step int(aug_level·1000) of the cosine schedule."""
    x, t, tokens = inputs["x"], inputs["timesteps"], inputs["text_emb"]
    if "low_res" not in inputs:
        out = {"forward": module(x, t, Cond(tokens=tokens))}
        if "timestep_text_emb" in inputs:
            pooled = module.text_pool(inputs["timestep_text_emb"])
            out["forward_timestep_text_emb"] = module(x, t, Cond(tokens=tokens, pooled=pooled))
        return out
    level = json.loads(meta["args"])["aug_level"]
    shown = LowRes(schedules.create("cosine", timesteps=1000), align_corners=True)(
        inputs["low_res"], x.shape[-1], level, inputs["aug_noise"]
    )
    return {"forward": module(x, t, Cond(tokens=tokens, **shown)), "noised_low_res": shown["low_res"]}


def if_diffusers(module, inputs, config, meta):
    x, low, level = inputs["sample"], None, None
    if "class_labels" in inputs:
        x, low = x.chunk(2, dim=1)
        level = inputs["class_labels"].double() / 1000
    cond = Cond(tokens=inputs["encoder_hidden_states"], low_res=low, low_res_level=level)
    return {"sample": module(x, inputs["timestep"], cond)}


def stable_diffusion(module, inputs, config, meta):
    told = {"tokens": inputs["encoder_hidden_states"], "labels": inputs.get("class_labels")}
    told |= {"pooled": inputs.get("text_embeds"), "size": inputs.get("time_ids")}
    out = {"sample": module(inputs["sample"], inputs["timestep"], Cond(**told))}
    if "encoder_attention_mask" in inputs:
        cond = Cond(**told, mask=inputs["encoder_attention_mask"].bool())
        out["sample_masked"] = module(inputs["sample"], inputs["timestep"], cond)
    return out


def unet2d(module, inputs, config, meta):
    cond = Cond(labels=inputs.get("class_labels"))
    return {"sample": module(inputs["sample"], inputs["timestep"], cond)}


CALLS = {
    "adm_official": adm,
    "if_official": if_official,
    "if_diffusers": if_diffusers,
    "sd_official": stable_diffusion,
    "sd_diffusers": stable_diffusion,
    "unet2d_diffusers": unet2d,
}

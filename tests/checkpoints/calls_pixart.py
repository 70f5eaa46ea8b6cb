"""How fixtures of PixArt are run, with all text tokens and with masked ones."""

from __future__ import annotations

import torch

from imagen_kit.conditioning import Cond


def _told(inputs, sides):
    return torch.cat([inputs[sides], inputs["aspect_ratio"]], dim=1) if sides in inputs else None


def official(module, inputs, config, meta):
    told = {"tokens": inputs["y"][:, 0], "size": _told(inputs, "img_hw")}
    mask = inputs["mask"].flatten(1).bool()
    return {
        "forward_nomask": module(inputs["x"], inputs["timestep"], Cond(**told)),
        "forward_masked": module(inputs["x"], inputs["timestep"], Cond(**told, mask=mask)),
    }


def diffusers(module, inputs, config, meta):
    told = {"tokens": inputs["encoder_hidden_states"], "size": _told(inputs, "resolution")}
    mask = inputs["encoder_attention_mask"].bool()
    return {
        "sample": module(inputs["hidden_states"], inputs["timestep"], Cond(**told)),
        "sample_masked": module(inputs["hidden_states"], inputs["timestep"], Cond(**told, mask=mask)),
    }


CALLS = {"pixart_official": official, "pixart_diffusers": diffusers}

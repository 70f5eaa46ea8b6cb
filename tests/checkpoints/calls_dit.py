"""How DiT fixtures are run."""

from __future__ import annotations

import json

import torch

from imagen_kit import guidance
from imagen_kit.conditioning import Cond
from imagen_kit.guidance.step import Step


def official(module, inputs, config, meta):
    out = {"forward": module(inputs["x"], inputs["t"], Cond(labels=inputs["y"]))}
    if "cfg_x" in inputs:
        scale = json.loads(meta["args"])["cfg_scale"]
        half = len(inputs["cfg_x"]) // 2
        both = module(
            inputs["cfg_x"][:half].repeat(2, 1, 1, 1), inputs["cfg_t"], Cond(labels=inputs["cfg_y"])
        )
        cond, uncond = both.chunk(2)
        # the official code guides three channels, also of latents; the unconditional half is given them too
        cfg = guidance.create("cfg", scale=scale, channels=3)
        first = cfg.apply(cond, {"cond": cond, "uncond": uncond}, Step(0.0, 1.0, 0.0))
        out["forward_with_cfg"] = torch.cat([first, torch.cat([first[:, :3], uncond[:, 3:]], dim=1)])
    return out


def diffusers(module, inputs, config, meta):
    cond = Cond(labels=inputs["class_labels"])
    return {"sample": module(inputs["hidden_states"], inputs["timestep"], cond)}


CALLS = {"dit_official": official, "dit_diffusers": diffusers}

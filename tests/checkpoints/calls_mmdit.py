"""How fixtures of MMDiT are run; the references are told 1000·t, ours the flow schedule's own t."""

from __future__ import annotations

import json

from imagen_kit.conditioning import Cond
from imagen_kit.guidance.layers import Change


def native(t):
    """In float64, so that 1000·t is what the reference was told."""
    return t.double() / 1000


def official(module, inputs, config, meta):
    t, cond = native(inputs["t"]), Cond(tokens=inputs["context"], pooled=inputs["y"])
    out = {"forward": module(inputs["x"], t, cond)}
    skipped = json.loads(meta.get("args", "{}")).get("skip_layers")
    if skipped:
        skip = Change("slg", "block", tuple(skipped))
        out["forward_skip_layers"] = skip(module)(inputs["x"], t, cond)
    return out


def diffusers(module, inputs, config, meta):
    cond = Cond(tokens=inputs["encoder_hidden_states"], pooled=inputs["pooled_projections"])
    return {"sample": module(inputs["hidden_states"], native(inputs["timestep"]), cond)}


CALLS = {"mmdit_official": official, "mmdit_diffusers": diffusers}

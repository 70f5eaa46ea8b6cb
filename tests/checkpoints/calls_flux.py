"""How fixtures of FLUX are run; the references take packed patches with their rows and columns."""

from __future__ import annotations

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.joint import from_patches, to_patches


def run(module, packed, ids, t, cond):
    """Packed patches (b, n, c·4) in, packed patches out."""
    _, h, w = (int(n) + 1 for n in ids.reshape(-1, 3).amax(0))
    x = from_patches(packed, h, w, 2, channels_first=True)
    return to_patches(module(x, t, cond), 2)


def official(module, inputs, config, meta):
    cond = Cond(tokens=inputs["txt"], pooled=inputs["y"], guidance=inputs.get("guidance"))
    return {"forward": run(module, inputs["img"], inputs["img_ids"], inputs["timesteps"], cond)}


def diffusers(module, inputs, config, meta):
    tokens, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
    cond = Cond(tokens=tokens, pooled=pooled, guidance=inputs.get("guidance"))
    return {"sample": run(module, inputs["hidden_states"], inputs["img_ids"], inputs["timestep"], cond)}


CALLS = {"flux_official": official, "flux_diffusers": diffusers}

"""How fixtures of ADM's classifiers are run."""

from __future__ import annotations


def official(module, inputs, config, meta):
    return {"forward": module(inputs["x"], inputs["timesteps"])}


CALLS = {"adm_classifier_official": official}

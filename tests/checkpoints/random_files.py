"""Small networks with random weights, as communities store them."""

from __future__ import annotations

import torch

from imagen_kit import checkpoints
from imagen_kit.checkpoints.loading import Origin, hollow
from imagen_kit.checkpoints.rules import to_foreign

DIT = {
    "in_channels": 4,
    "learn_sigma": True,
    "patch_size": 2,
    "width": 384,
    "depth": 2,
    "heads": 6,
    "num_classes": 10,
    "details": {
        "frequency_shift": 0.0,
        "mlp_norm_eps": 1e-6,
        "block_embedders": False,
        "mlp_ratio": 4.0,
        "null_class": True,
    },
    "_size": 8,
}


def random_tensors(name, kwargs, seed=0):
    """A file's tensors in the format ``name`` for a network of these arguments."""
    format = checkpoints.get(name)
    draw = torch.Generator().manual_seed(seed)
    state = hollow(Origin(format.kind, format.part, kwargs)).state_dict()
    own = {k: torch.randn(v.shape, generator=draw) for k, v in state.items()}
    return {k: v.contiguous() for k, v in to_foreign(format.rules(kwargs), own).items()}

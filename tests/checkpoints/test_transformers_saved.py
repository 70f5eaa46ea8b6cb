"""Official files of the transformers: written back bit for bit, and through diffusers' layout to the same answers."""

from __future__ import annotations

import pytest
import torch
from test_fixtures import CALLS, FIXTURES, read

from imagen_kit import checkpoints
from imagen_kit.checkpoints.rules import to_foreign
from imagen_kit.errors import KitError

PARTS = ("sd3", "flux_official", "pixart")
OURS = [path for path in FIXTURES if path.stem.startswith(PARTS)]
every = pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)


def rewritten(module, name):
    origin = module.checkpoint_origin
    return to_foreign(checkpoints.get(name).rules(origin.kwargs), module.state_dict())


@every
def test_written_back(path):
    config, weights, *_ = read(path)
    module = checkpoints.from_state_dict(weights, config=config)
    back = rewritten(module, module.checkpoint_origin.format)
    assert back.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(back[key], weights[key])] == []


@every
@torch.no_grad()
def test_through_the_diffusers_layout(path):
    config, weights, inputs, _, meta = read(path)
    module = checkpoints.from_state_dict(weights, config=config)
    origin = module.checkpoint_origin
    other = checkpoints.get(origin.format.replace("official", "diffusers"))
    call = CALLS[origin.format]
    if origin.kwargs["details"]["mlp_ratio"] != 4.0:
        with pytest.raises(KitError, match="mlp_ratio 2"):
            rewritten(module, other.name)
        return
    again = checkpoints.from_state_dict(rewritten(module, other.name), config=other.config(origin.kwargs))
    assert again.checkpoint_origin.format == other.name
    want, got = call(module, inputs, config, meta), call(again, inputs, config, meta)
    assert all(torch.equal(got[key], want[key]) for key in want)

"""Parts as the command line writes them."""

from __future__ import annotations

import json

import pytest

from imagen_kit.errors import KitError
from imagen_kit.evaluation import spec


def test_names_options_and_what_is_kept():
    (plain, ddim) = spec.make_entries(["heun", "ddim:eta=0.5:spacing=karras", "heun"], {"spacing": "log_snr"})
    assert plain.label == "heun"
    assert plain.sampler.spacing == "log_snr"
    assert (ddim.sampler.eta, ddim.sampler.spacing) == (0.5, "karras")
    assert ddim.part == {"name": "ddim", "eta": 0.5, "spacing": "karras"}
    facts = json.loads(json.dumps(ddim.facts))
    assert facts["name"] == "ddim"
    assert facts["options"]["eta"] == 0.5
    assert spec.create("schedule", "flow:shift=3", {"nonsense": 1}).shift == 3
    assert spec.grid_options(plain.sampler)["spacing"] == "log_snr"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dimm", "did you mean 'ddim'"),
        ("ddim:etta=1", "did you mean 'eta'"),
        ("ddim:eta", "NAME:OPTION=VALUE"),
        ("ddim:eta=", "NAME:OPTION=VALUE"),
        ("ddim:eta=much", "must be a number"),
        ("ddim:eta=7", "eta"),
        ("ddim:eta=0:eta=1", "given twice"),
        ("ddim:spacing=kartas", "did you mean 'karras'"),
        ("", "sampler"),
    ],
)
def test_mistakes(text, says):
    with pytest.raises(KitError, match=says):
        spec.make_entries([text])

"""Every fixture of a folder: loaded through ``checkpoints``, run, every output compared.

The folder is IMAGEN_KIT_FIXTURES, or the official formats' files in tests/data/checkpoints. How a format's inputs
are fed to our forward stands in calls_<family>.py: ``CALLS = {format name: function}`` with

    function(module, inputs: {name: Tensor}, config: dict, meta: {str: str}) -> {output name: Tensor}
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from imagen_kit import checkpoints

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("IMAGEN_KIT_FIXTURES") or HERE.parent / "data" / "checkpoints")
FIXTURES = sorted(FOLDER.glob("*.safetensors"))
CALLS = {
    name: call
    for file in sorted(HERE.glob("calls_*.py"))
    for name, call in importlib.import_module(file.stem).CALLS.items()
}


def read(path):
    """(config, weights in float32 where they are floating, inputs, outputs, metadata)."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts = [
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("weights.", "inputs.", "outputs.")
    ]
    weights = {k: v.float() if v.is_floating_point() else v for k, v in parts[0].items()}
    return json.loads(meta["config"]), weights, parts[1], parts[2], meta


def tolerance(meta, name):
    """The fixtures' own rule: three times the rounding of the reference's float32 run, at most 1e-4."""
    rounding = json.loads(meta.get("max_abs_diff_to_float64_run", "{}")).get(name, 0.0)
    return min(1e-4, 3 * max(2e-6, rounding))


@pytest.mark.parity
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@torch.no_grad()
def test_fixture(path):
    config, weights, inputs, outputs, meta = read(path)
    module = checkpoints.from_state_dict(weights, config=config)
    name = module.checkpoint_origin.format
    assert name in CALLS, f"format {name} has no entry in a calls_*.py"
    got = CALLS[name](module, inputs, config, meta)
    assert outputs
    assert outputs.keys() <= got.keys(), "some outputs of the reference are not computed"
    for key, want in outputs.items():
        torch.testing.assert_close(
            got[key].float(),
            want.float(),
            atol=tolerance(meta, key),
            rtol=0,
            msg=lambda m, key=key: f"{key}: {m}",
        )


def test_the_folder_is_not_empty():
    assert FIXTURES, f"no fixtures in {FOLDER}"


def test_every_format_can_be_judged():
    """A new format comes with its row, so that a fixture of it is never skipped."""
    assert set(checkpoints.names()) == set(CALLS)

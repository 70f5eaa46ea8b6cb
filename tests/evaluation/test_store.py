"""What is kept of a comparison comes back, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest
import torch

from imagen_kit.errors import KitError
from imagen_kit.evaluation.drawing import Drawn
from imagen_kit.evaluation.store import Store, read

SETTINGS = {"subject": "s", "n": 2, "grid": (1, 2)}


def cell(**key):
    return {"sampler": "ddim", "steps": 4, "guidance": None, "seed": 0, **key}


def test_cells_are_on_the_disk_when_added(tmp_path):
    store = Store(tmp_path / "a" / "b", SETTINGS)
    assert not (tmp_path / "a").exists()  # until there is something to keep
    store.add_sampler("ddim", {"name": "ddim", "options": {"eta": 0.0}})
    store.add(cell())
    again = Store(tmp_path / "a" / "b", SETTINGS)
    assert again.has(**cell())
    for other in ({"steps": 5}, {"guidance": 1.0}, {"seed": 1}, {"sampler": "heun"}):
        assert not again.has(**cell(**other))
    assert read(tmp_path / "a" / "b") == json.loads(json.dumps(store.content))
    with pytest.raises(KitError, match="made with n = 2, not 3"):
        Store(tmp_path / "a" / "b", {**SETTINGS, "n": 3})
    with pytest.raises(KitError, match=r"sampler 'ddim' was made with eta = 0\.0, not 1"):
        again.add_sampler("ddim", {"name": "ddim", "options": {"eta": 1}})


@pytest.mark.parametrize("single", [True, False])
def test_converged_results_come_back(tmp_path, single):
    first = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)  # as some networks answer
    final = first if single else torch.rand(2, 3, 16, 16)
    store = Store(tmp_path, SETTINGS)
    assert store.converged(1.5, 3) is None
    store.add_converged(1.5, 3, Drawn(first, final, {}, {}, 0.0), {"nfe": 9})
    kept = Store(tmp_path, SETTINGS).converged(1.5, 3)
    assert torch.equal(kept.first, first)
    assert torch.equal(kept.final, final)
    assert store.converged(None, 3) is None
    assert store.converged(1.5, 0) is None
    (tmp_path / "converged" / "guidance-1.5-seed-3.safetensors").unlink()
    assert store.converged(1.5, 3) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 3}', '{"format": 2, "cells": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(KitError, match="choose another folder"):
        read(tmp_path)
    with pytest.raises(KitError, match="choose another folder"):
        Store(tmp_path, SETTINGS)
    assert (tmp_path / "results.json").read_text() == text

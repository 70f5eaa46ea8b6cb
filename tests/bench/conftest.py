"""Kinds of subject from another distribution, for one test at a time."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from imagen_kit.bench import subjects

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="session")
def imports():
    """What rows import, frozen as a worker does it: every row collects garbage."""

    subjects.names()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fakes(monkeypatch, imports):
    """The module ``bench_fakes``, registered here and found by workers."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    before = {name: dict(getattr(subjects._registry, name)) for name in ("_factories", "_facts")}
    import bench_fakes

    subjects.register("fake", names=lambda: list(bench_fakes.FAKES))(bench_fakes.fake)
    yield bench_fakes
    for name, content in before.items():
        held = getattr(subjects._registry, name)
        held.pop("fake", None)
        held.update(content)
    sys.modules.pop("bench_fakes", None)

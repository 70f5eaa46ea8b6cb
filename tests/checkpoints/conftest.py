"""Files of small networks."""

from __future__ import annotations

import pytest
from random_files import DIT, random_tensors


@pytest.fixture
def dit():
    """The official file of a DiT of width 384."""
    return random_tensors("dit_official", DIT)


@pytest.fixture
def dit_diffusers():
    details = {**DIT["details"], "frequency_shift": 1.0, "mlp_norm_eps": 1e-5, "block_embedders": True}
    return random_tensors("dit_diffusers", {**DIT, "details": details})

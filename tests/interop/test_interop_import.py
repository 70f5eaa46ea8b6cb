"""Naming a library's interop loads neither it nor anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imagen_kit import interop

CODE = """
import sys
from imagen_kit import interop
interop.diffusers.schedule({"beta_schedule": "linear"})
interop.k_diffusion.wrap(None)
print(*{name for name in sys.modules if "." not in name})
"""


def test_interop_is_light():
    run = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    loaded = set(run.stdout.split())
    assert "imagen_kit" in loaded
    assert not loaded & {"diffusers", "transformers", "accelerate", "k_diffusion", "scipy", "PIL", "timm"}


def test_names():
    assert dir(interop) == ["diffusers", "k_diffusion"]
    with pytest.raises(AttributeError, match="no attribute 'comfy'"):
        _ = interop.comfy

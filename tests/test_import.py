"""Importing costs nothing: heavy libraries stay out until a part that needs them is built."""

from __future__ import annotations

import subprocess
import sys

import pytest

import imagen_kit

HEAVY = (
    "transformers",
    "open_clip",
    "timm",
    "diffusers",
    "matplotlib",
    "torchmetrics",
    "accelerate",
    "PIL",
    "xformers",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def test_the_package_alone_loads_not_even_torch():
    assert not loaded_after("import imagen_kit") & {"torch", "numpy", "yaml", "pydantic", *HEAVY}


def test_registries_and_spine_load_nothing_heavy():
    code = """
import imagen_kit
from imagen_kit import pipeline, recipe, zoo, denoise
for kind in ("text_encoders", "denoisers", "samplers", "guidance", "schedules", "codecs"):
    package = getattr(imagen_kit, kind)
    for name in package.names():
        package.describe(name)
recipe.load("tiny")
"""
    found = loaded_after(code)
    assert "torch" in found
    assert not found & set(HEAVY)


# What the first picture has no use for: other libraries, and torch's compiler, which seven hundred modules are.
IDLE = (
    *HEAVY,
    "accelerate",
    "huggingface_hub",
    "scipy",
    "sympy",
    "torchao",
    "torchvision",
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.fx.experimental.symbolic_shapes",
)


@pytest.mark.parametrize("options", [[], ["--steps", "2", "--sampler", "ddim", "--guidance", "2"]])
def test_a_picture_is_drawn_without_idle_libraries(tmp_path, options):
    words = ["generate", "a small red star on a white background", "-o", str(tmp_path / "a.png"), *options]
    words += ["--set", "stages.1.sampler.steps=1"] if options else []
    script = "import sys\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    code = f"from imagen_kit.cli import main\nassert main({words!r}) == 0\n{script}"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = set(run.stderr.splitlines())
    assert (tmp_path / "a.png").is_file()
    assert "torch" in found
    alone = subprocess.run(
        [sys.executable, "-c", f"import torch\n{script}"], check=True, capture_output=True, text=True
    )
    wanted = {"PIL", *alone.stderr.splitlines()}  # which writes the picture, and what torch itself loads
    assert sorted(found & set(IDLE) - wanted) == []


@pytest.mark.parametrize("name", dir(imagen_kit))
def test_every_public_name_is_there(name):
    assert getattr(imagen_kit, name) is not None


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = imagen_kit.sampler

"""Recipes that say how their networks are run: keys, faults, building, and what is printed."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import recipe
from imagen_kit.errors import KitError, RecipeError
from imagen_kit.performance import Performance, automatic
from imagen_kit.recipe import running

BASE = "stages.base.performance."


def faults(*overrides):
    with pytest.raises(RecipeError) as error:
        recipe.load("tiny", overrides)
    assert "\n" not in str(error.value)
    return {fault.path: fault.message for fault in error.value.faults}


def test_every_fault_is_told_with_its_path():
    found = faults(
        BASE + "dtype=bf61",
        BASE + "memory_formt=channels_last",
        BASE + "compile=block",
        BASE + "graph=1",
        "stages.sr.performance=fast",
        "offload=modl",
    )
    assert "did you mean 'bf16'?" in found["stages.0.performance.dtype"]
    assert found["stages.0.performance.memory_formt"] == "unknown key; did you mean 'memory_format'?"
    assert "did you mean 'blocks'?" in found["stages.0.performance.compile"]
    assert found["stages.0.performance.graph"] == "must be true or false, not 1"
    assert "must be a map of keys" in found["stages.1.performance"]
    assert "did you mean 'model'?" in found["offload"]


def test_a_bare_off_is_off():
    spec = recipe.load("tiny", [BASE + "compile=off", BASE + "quantise=off"]).stages[0].performance
    assert (spec.compile, spec.quantise) == ("off", "off")


def test_unknown_caches_and_options_of_caches_are_faults():
    assert "unknown" in faults("stages.base.cache=fist_block")["stages.0.cache.name"]
    found = faults("stages.base.cache={name: first_block, treshold: 0.1}")
    assert "did you mean 'threshold'?" in found["stages.0.cache.treshold"]


def test_a_stage_says_its_precision_and_build_the_others():
    pipeline = recipe.load("tiny", [BASE + "dtype=bf16"]).build(dtype=torch.float16)
    assert [stage.dtype for stage in pipeline.stages] == [torch.bfloat16, torch.float16]
    assert [stage.performance.dtype for stage in pipeline.stages] == ["bf16", "fp16"]
    assert all(stage.picture_dtype == torch.float32 for stage in pipeline.stages)


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_pictures_in_bfloat16_are_those_in_float32(dtype):
    checked = recipe.load("pocket-imagen", ["stages.base.sampler.steps=4", "stages.sr.sampler.steps=2"])
    want = checked.build()("a large red star on a white background").tensor
    got = checked.build(dtype=dtype)("a large red star on a white background").tensor
    assert got.dtype == torch.float32
    # flat colours: the edges of the star move by less than a pixel, of which there are some 400 in 128²
    assert 0 < float((got - want).abs().mean()) < 0.02


def test_nothing_said_nothing_changed():
    pipeline = recipe.load("tiny").build()
    assert all(stage.performance == Performance() for stage in pipeline.stages)
    assert all(stage.dtype == torch.float32 for stage in pipeline.stages)


def test_auto_counts_the_operations_of_a_picture(monkeypatch):
    monkeypatch.setattr(automatic, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(running, "multiplies_bf16", lambda: True)
    checked = recipe.load("tiny")
    assert [stage.performance.dtype for stage in checked.build(dtype="auto").stages] == ["fp32", "fp32"]
    monkeypatch.setattr(automatic, "LEAST_FLOPS", 1e6)  # tiny's networks take 27 MFLOP and more
    pipeline = checked.build(dtype="auto")
    assert [stage.performance.dtype for stage in pipeline.stages] == ["bf16", "bf16"]
    monkeypatch.setattr(running.trial, "AT_ONCE", 0)  # too large to count, and so large enough
    monkeypatch.setattr(automatic, "LEAST_FLOPS", running.LEAST_FLOPS)
    assert [stage.performance.dtype for stage in checked.build(dtype="auto").stages] == ["bf16", "bf16"]


def test_what_a_machine_lacks_is_told_with_the_stage(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from imagen_kit import attention_kernels

    attention_kernels.missing.cache_clear()
    with pytest.raises(RecipeError) as error:
        recipe.load("tiny", ["stages.sr.performance.attention=cudnn"]).build()
    attention_kernels.missing.cache_clear()
    assert [fault.path for fault in error.value.faults] == ["stages.1.performance"]
    assert "needs a GPU" in str(error.value)


def test_an_unknown_precision():
    with pytest.raises(KitError, match="unknown performance dtype 'bf61'; did you mean 'bf16'"):
        recipe.load("tiny").build(dtype="bf61")


def test_other_torch_dtypes_are_still_taken():
    assert recipe.load("tiny").build(dtype=torch.float64).stages[0].dtype == torch.float64


def test_a_pipeline_may_be_moved_to_another_precision_afterwards():
    pipeline = recipe.load("tiny").build(dtype="bf16").to(dtype=torch.float32)
    assert all(stage.dtype == stage.picture_dtype == torch.float32 for stage in pipeline.stages)
    assert pipeline("a red star").tensor.isfinite().all()

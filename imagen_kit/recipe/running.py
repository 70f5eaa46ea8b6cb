"""The part of a recipe that says how its networks are run, carried out on a built pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from imagen_kit.errors import Fault, KitError, RecipeError
from imagen_kit.performance import apply, apply_to_codec
from imagen_kit.performance.automatic import LEAST_FLOPS, multiplies_bf16
from imagen_kit.performance.options import Performance
from imagen_kit.recipe import trial

if TYPE_CHECKING:
    from imagen_kit.pipeline import Pipeline
    from imagen_kit.recipe import Recipe
    from imagen_kit.stage import Stage

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run_as_told(
    pipeline: Pipeline, recipe: Recipe, device: torch.device | str, dtype: torch.dtype | str | None
) -> Pipeline:
    """The pipeline on the device, its networks in the precision, layout and form that each stage asks for.

    Args:
        pipeline: made from the recipe, on the CPU.
        recipe: what it was made from.
        device: where it runs.
        dtype: of stages that name none.

    Raises:
        RecipeError: what a stage asks for and this machine has not, with the path of the stage.
    """
    for index, stage in enumerate(pipeline.stages):
        pipeline.stages[index] = stage_as_told(stage, recipe, index, device, dtype)
    return pipeline.to(device)


def stage_as_told(
    stage: Stage, recipe: Recipe, index: int, device: torch.device | str, dtype: torch.dtype | str | None
) -> Stage:
    """The stage, its networks on the device and in the form that it asks for; arguments as ``run_as_told``."""
    if isinstance(dtype, torch.dtype) and dtype not in SHORT:
        for module in stage.modules:
            module.to(device, dtype)
        return stage
    performance = with_dtype(stage.performance, dtype)
    if recipe.spec.offload != "none" and performance.prepack is None:
        performance = replace(performance, prepack=False)  # weights would be packed at every turn
    flops = _flops(recipe, index, stage.denoiser, performance, device)
    try:
        first, *_ = [apply(module, performance, device, flops) for module in stage.modules]
    except KitError as error:
        fault = Fault(f"stages.{index}.performance", str(error))
        raise RecipeError(recipe.source, [fault]) from error
    if isinstance(stage.codec, nn.Module):
        apply_to_codec(stage.codec, first.chosen, device)
    return replace(stage, performance=first.chosen)


def with_dtype(performance: Performance, dtype: torch.dtype | str | None) -> Performance:
    """``performance`` with ``dtype`` where it names none; KitError for an unknown one."""
    if performance.dtype is not None or dtype is None:
        return performance
    return replace(performance, dtype=SHORT[dtype] if isinstance(dtype, torch.dtype) else dtype)


def _flops(
    recipe: Recipe, index: int, network: nn.Module, performance: Performance, device: torch.device | str
) -> float | None:
    """Operations of an evaluation of one picture where ``auto`` goes by them: counted in one, if it is quick."""
    if performance.dtype != "auto" or torch.device(device).type != "cpu" or not multiplies_bf16():
        return None
    from imagen_kit.recipe import check

    stage, labels = recipe.stages[index], recipe.spec.labels
    known = check.dimensions(stage, index)
    if sum(p.numel() for p in network.parameters()) * known["image_size"] ** 2 > trial.AT_ONCE:
        return LEAST_FLOPS  # and more: a weight is used at a fiftieth of the places or at more of them
    options = check.wired(check.registries()["denoiser"], stage.denoiser.name, stage.denoiser.options, known)
    return trial.flops(network, stage, known, options, None if labels is None else labels.classes, 2)

"""From a recipe to what the training loop trains."""

from __future__ import annotations

from typing import Any

import torch

from imagen_kit import data
from imagen_kit.errors import KitError, unknown
from imagen_kit.training.config import TrainConfig
from imagen_kit.training.loop import Task


def build(recipe: Any) -> Task:
    """The task of a loaded recipe (``imagen_kit.recipe.Recipe``) with a ``train`` section."""
    return _text(recipe) if recipe.train.task == "text" else _diffusion(recipe)


def _text(recipe: Any) -> Task:
    from imagen_kit.training.text import TextTask

    part = recipe.spec.text_encoder
    size = None if part is None else part.options.get("size")
    if part is None or part.name != "t5" or not isinstance(size, dict):
        raise KitError(
            "text pretraining needs text_encoder: {name: t5, weights: random, size: {d_model: ...}}"
        )
    return TextTask(recipe.train, size)


def _diffusion(recipe: Any) -> Task:
    from imagen_kit.training.diffusion import DiffusionTask

    config: TrainConfig = recipe.train
    if recipe.spec.labels is not None:
        raise KitError("labels: training reads captions; models of class labels are sampled only")
    names = [stage.name for stage in recipe.stages]
    if config.stage is None and len(names) > 1:
        raise KitError(f"train.stage: say which stage to train: {', '.join(names)}")
    if config.stage is not None and config.stage not in names:
        raise KitError("train.stage: " + unknown("stage", config.stage, names))
    index = 0 if config.stage is None else names.index(config.stage)
    options = dict(config.data)
    dataset = data.create(options.pop("name", "pocket"), **options)
    encoder = recipe.build_text_encoder(index)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = recipe.build_stage_denoiser(index, encoder, weights=config.init == "weights")
    return DiffusionTask(
        config,
        module,
        recipe.stages[index],
        recipe.build_stage_parts(index),
        encoder,
        dataset,
        recipe.stages[index - 1].size if index else None,
        recipe.spec.unconditional,
    )

"""A recipe's pipeline whose parts have memory only while they work (``offload: model`` and ``layers``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imagen_kit.errors import Fault, RecipeError
from imagen_kit.performance import Performance, apply_to_codec
from imagen_kit.performance.offload import Make, Offload, keep_off
from imagen_kit.recipe import check, source
from imagen_kit.recipe.running import stage_as_told

if TYPE_CHECKING:
    from imagen_kit.pipeline import Pipeline, Stage
    from imagen_kit.recipe import Recipe


def build_offloaded(
    recipe: Recipe, device: torch.device | str, dtype: torch.dtype | str | None, weights: bool
) -> Pipeline:
    """The pipeline; each part is built, put where it waits, and only then the next is built.

    On the CPU a part is built anew for each of its turns: mapped from its file where that is stored as it runs.

    Args:
        recipe: with an ``offload`` other than ``none``.
        device, dtype, weights: as for ``Recipe.build``.

    Raises:
        KitError: weights that are missing or do not fit, or a stage whose way of running needs its weights to stay.
    """
    from imagen_kit.pipeline import Pipeline

    keeper = Offload(recipe.spec.offload, device)
    _require_movable(recipe, keeper)
    encoder = _encoder(recipe, keeper, None)
    stages = [_stage(recipe, keeper, index, encoder, dtype, weights) for index in range(len(recipe.stages))]
    pipeline = Pipeline(encoder, stages, recipe.spec.unconditional)
    pipeline.offload = keeper
    return pipeline


def _encoder(recipe: Recipe, keeper: Offload, index: int | None) -> Any:
    encoder = recipe.build_text_encoder(index)
    keep_off(encoder, keeper, _makes(recipe, index))
    return encoder


def _makes(recipe: Recipe, index: int | None) -> list[Make]:
    """What makes the network of the text encoder, of several in one that of each."""
    own = None if index is None else recipe.stages[index].text_encoder
    part = own or recipe.spec.text_encoder
    if part is None:
        return []
    options = source.localised(part.options, recipe.folder)
    entries = options.get("encoders", [{"name": part.name, **options}])
    return [partial(_network, entry) for entry in entries]


def _network(entry: dict[str, Any]) -> nn.Module:
    options = {key: value for key, value in entry.items() if key not in ("name", "use")}
    return check.registries()["text_encoder"].create(entry["name"], **options).network


def _stage(
    recipe: Recipe,
    keeper: Offload,
    index: int,
    encoder: Any,
    dtype: torch.dtype | str | None,
    weights: bool,
) -> Stage:
    own = None if recipe.stages[index].text_encoder is None else _encoder(recipe, keeper, index)

    def make() -> Stage:
        bare = recipe.build_stage(index, encoder, weights, own)
        return stage_as_told(bare, recipe, index, keeper.device, dtype)

    stage = make()
    for place, module in enumerate(stage.modules):
        keeper.adopt(module, partial(_nth, make, place), stacked=True)
    stored = weights and recipe.stages[index].codec.weights not in (None, "random")
    # The initial values of a codec are drawn at random: made anew it would be another.
    keeper.adopt(
        stage.codec, partial(_codec, recipe, index, stage.performance, keeper.device) if stored else None
    )
    return stage


def _codec(recipe: Recipe, index: int, chosen: Performance, device: torch.device | str) -> nn.Module:
    codec = recipe.build_codec(index)
    apply_to_codec(codec, chosen, device)
    return codec


def _nth(make: Callable[[], Stage], place: int) -> nn.Module:
    return make().modules[place]


def _require_movable(recipe: Recipe, keeper: Offload) -> None:
    """RecipeError for what needs weights to stay where they are."""
    faults = []
    for index, stage in enumerate(recipe.stages):
        run, path = stage.performance, f"stages.{index}.performance"
        if run.graph and keeper.device.type == "cuda":
            faults.append(
                Fault(f"{path}.graph", "a captured graph needs its weights to stay: offload must be none")
            )
        for key in ("compile", "quantise"):
            if keeper.mode == "layers" and keeper.device.type == "cuda" and getattr(run, key) != "off":
                faults.append(Fault(f"{path}.{key}", "must be off where layers are offloaded one by one"))
    if faults:
        raise RecipeError(recipe.source, faults)

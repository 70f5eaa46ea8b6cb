"""Every fault of a recipe at once: structure, parts, and how the parts fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from imagen_kit.errors import Fault, unknown
from imagen_kit.recipe import check
from imagen_kit.recipe.spec import PART_KEYS, LabelsSpec, Part, RecipeSpec, StageSpec, structure_faults


def faults(data: dict[str, Any]) -> list[Fault]:
    """All that is wrong with the map of a recipe, without doubles; empty when it can be built.

    Whether parts fit each other is asked only of parts that are right by themselves.
    """
    found = [
        *structure_faults(RecipeSpec, data),
        *prompt_faults(data),
        *stage_faults(data),
        *part_faults(data),
        *train_faults(data),
    ]
    if not found:
        spec = RecipeSpec.model_validate(data)
        found = [
            *cascade_faults(spec),
            *(f for i, stage in enumerate(spec.stages) for f in fit_faults(stage, i, spec.labels)),
        ]
    return list(dict.fromkeys(found))


def prompt_faults(data: dict[str, Any]) -> Iterator[Fault]:
    """Whether it is said what prompts are: text, or class labels."""
    text, labels = data.get("text_encoder"), data.get("labels")
    if text is None and labels is None:
        yield Fault("text_encoder", "is missing")
    if text is not None and labels is not None:
        yield Fault("labels", "stands in place of text_encoder; leave one of them out")
    if isinstance(labels, dict) and labels.get("names") == "imagenet" and labels.get("classes") != 1000:
        yield Fault("labels.names", f"imagenet has 1000 classes, not {labels.get('classes')}")


def stage_faults(data: dict[str, Any]) -> Iterator[Fault]:
    """Whether there are stages; only the pretraining of a text encoder needs none."""
    train = data.get("train")
    if not data.get("stages") and not (isinstance(train, dict) and train.get("task") == "text"):
        yield Fault("stages", "must have at least one stage (only a recipe with train.task: text has none)")


def part_faults(data: dict[str, Any]) -> Iterator[Fault]:
    """Names, options and value types of all parts, wherever the structure is sound enough to look."""
    kinds = check.registries()
    yield from check.option_faults(kinds["text_encoder"], data.get("text_encoder"), "text_encoder")
    stages = data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            continue
        path = f"stages.{index}"
        for key in PART_KEYS:
            wired = check.WIRED if key == "denoiser" else ()
            yield from check.option_faults(kinds[key], stage.get(key), f"{path}.{key}", wired)
        yield from check.option_faults(kinds["cache"], stage.get("cache"), f"{path}.cache")
        yield from check.option_faults(
            kinds["text_encoder"], stage.get("text_encoder"), f"{path}.text_encoder"
        )
        low_res = stage.get("low_res")
        noising = low_res.get("schedule") if isinstance(low_res, dict) else None
        yield from check.option_faults(kinds["schedule"], noising, f"{path}.low_res.schedule")
        guidance = stage.get("guidance")
        for place, part in enumerate(guidance if isinstance(guidance, list) else []):
            yield from check.option_faults(kinds["guidance"], part, f"{path}.guidance.{place}")
        networks = stage.get("networks")
        for name, network in (networks if isinstance(networks, dict) else {}).items():
            part, here = (
                network.get("denoiser") if isinstance(network, dict) else None,
                f"{path}.networks.{name}",
            )
            yield from check.option_faults(kinds["denoiser"], part, f"{here}.denoiser", check.WIRED)
        if isinstance(stage.get("prediction"), str):
            yield from check.prediction_faults(stage["prediction"], f"{path}.prediction")


def cascade_faults(spec: RecipeSpec) -> Iterator[Fault]:
    """Whether the stages follow each other."""
    for index, stage in enumerate(spec.stages):
        before = spec.stages[:index]
        if stage.name in [other.name for other in before]:
            yield Fault(
                f"stages.{index}.name", f"{stage.name!r} names two stages; each needs a name of its own"
            )
        if before and stage.size < before[-1].size:
            rule = f"must be at least {before[-1].size}, the size of the stage before, not {stage.size}"
            yield Fault(f"stages.{index}.size", rule)
        if stage.text_encoder is not None and spec.labels is not None:
            yield Fault(f"stages.{index}.text_encoder", "prompts are labels here; leave it out")
        if stage.low_res.told == "label" and spec.labels is not None:
            yield Fault(f"stages.{index}.low_res.told", "must be level: prompts are the labels here")
    for key in ("low_res_level", "low_res"):
        if spec.stages and key in spec.stages[0].model_fields_set and getattr(spec.stages[0], key):
            yield Fault(f"stages.0.{key}", "the first stage has no picture before it; leave it out")


def fit_faults(stage: StageSpec, index: int, labels: LabelsSpec | None = None) -> Iterator[Fault]:
    """Ranges that constructors know, and whether schedule, sampler, prediction and denoiser fit."""
    import torch

    kinds, path = check.registries(), f"stages.{index}"
    parts: list[tuple[str, str, Part]] = [
        ("schedule", "schedule", stage.schedule),
        ("codec", "codec", stage.codec),
        ("sampler", "sampler", stage.sampler),
        *(("guidance", f"guidance.{place}", part) for place, part in enumerate(stage.guidance)),
    ]
    built: dict[str, Any] = {}
    for kind, key, part in parts:
        factory = partial(kinds[kind].create, part.name, **part.options)
        with torch.device("meta" if kind == "codec" else "cpu"):
            built[key], found = check.construct(factory, f"{path}.{key}")
        yield from found
    yield from check.construct(partial(check.low_res, stage), f"{path}.low_res")[1]
    schedule, sampler, codec = built["schedule"], built["sampler"], built["codec"]
    guidance = {f"{path}.{key}": part for key, part in built.items() if key.startswith("guidance.") and part}
    if schedule is not None and sampler is not None:
        yield from check.sampler_faults(sampler, schedule, stage, path)
    null = labels is None or labels.null
    yield from check.guidance_faults(guidance, sampler, list(stage.networks), null)
    if codec is None or schedule is None:
        return
    if stage.size % codec.factor:
        yield Fault(
            f"{path}.size",
            f"must be a multiple of {codec.factor} (codec {stage.codec.name}), not {stage.size}",
        )
    else:
        text = {"context_dim": check.ASSUMED_TEXT_DIM} if labels is None else {"num_classes": labels.classes}
        if stage.told.size is not None and labels is None:  # sizes are joined with pooled text
            text["pooled_dim"] = check.ASSUMED_TEXT_DIM
        yield from check.denoiser_faults(kinds["denoiser"], stage, index, f"{path}.denoiser", text, guidance)
        for name, network in stage.networks.items():
            other, here = stage.model_copy(update={"denoiser": network.denoiser}), f"{path}.networks.{name}"
            yield from check.denoiser_faults(kinds["denoiser"], other, index, f"{here}.denoiser", text)


def train_faults(data: dict[str, Any]) -> Iterator[Fault]:
    """Faults of the ``train`` section, where there is one."""
    if isinstance(data.get("train"), dict):
        from imagen_kit.training.config import TrainConfig

        yield from structure_faults(TrainConfig, data["train"], "train")
        yield from check.option_faults(check.registries()["data"], data["train"].get("data"), "train.data")
        wanted, stages = data["train"].get("stage"), data.get("stages")
        names = [
            str(s.get("name")) for s in (stages if isinstance(stages, list) else []) if isinstance(s, dict)
        ]
        if isinstance(wanted, str) and wanted not in names:
            yield Fault("train.stage", unknown("stage", wanted, names))


def train_config(data: dict[str, Any]) -> Any:
    """The ``train`` section of a sound recipe as a ``TrainConfig``, or None."""
    if data.get("train") is None:
        return None
    from imagen_kit.training.config import TrainConfig

    return TrainConfig.model_validate(data["train"])

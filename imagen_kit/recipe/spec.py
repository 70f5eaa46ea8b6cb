"""The structure of a recipe as pydantic models, and pydantic's complaints as plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imagen_kit.errors import Fault, nearest


class Part(BaseModel):
    """A component: its registered name, every other key an option of its constructor."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SamplerPart(Part):
    """A sampler and the number of steps it takes by default in this stage; None leaves it to the sampler."""

    steps: int | None = Field(None, ge=1)


class CodecPart(Part):
    """A codec and where its weights lie, as in the stage; None for one without, or at its initial values."""

    weights: str | None = None


class ToldSpec(BaseModel):
    """Numbers that a network is told besides the prompt, the same for every picture.

    ``size``: SDXL's original height and width, top and left of the crop, target height and width; PixArt's
    height, width and aspect ratio. ``guidance``: the scale that a distilled network obeys (FLUX.1-dev).
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    size: list[float] | None = None
    guidance: float | None = None


class LabelsSpec(BaseModel):
    """Prompts are class labels: see ``imagen_kit.labels.Labels``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    classes: int = Field(ge=1)
    names: str | None = None
    null: bool = True


class PerformanceSpec(BaseModel):
    """How a stage's network is run; see ``imagen_kit.performance.Performance``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    codec_dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    memory_format: Literal["auto", "channels_last", "contiguous"] | None = None
    compile: Literal["off", "blocks", "whole"] = "off"
    quantise: Literal["off", "int8", "int8_weights", "fp8"] = "off"
    attention: (
        Literal["sdpa", "flash", "cudnn", "efficient", "math", "flash3", "flex", "xformers", "eager"] | None
    ) = None
    prepack: bool | None = None
    graph: bool = False
    remember_text: bool = True


class LowResSpec(BaseModel):
    """How a later stage is shown the picture before it; see ``imagen_kit.cascade.LowRes``.

    ``schedule`` noises it, ``align_corners`` is of its enlargement, ``told`` how the network learns the noise.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    schedule: Part | None = None
    align_corners: bool = False
    told: Literal["level", "label"] = "level"


class NetworkSpec(BaseModel):
    """A further network of a stage that guidance asks for by name, such as the weak one of autoguidance.

    It has the stage's schedule and prediction; ``weights`` as in the stage.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    denoiser: Part
    weights: str = "random"


class StageSpec(BaseModel):
    """One diffusion model of the cascade.

    ``size`` is the side of its picture in pixels, ``low_res_level`` the noise level in [0, 1] at which a
    later stage is shown the picture of the one before and ``low_res`` how, ``text_encoder`` the stage's own
    where it is not the recipe's, ``weights`` a checkpoint of any known format (a file
    or folder relative to the recipe; ``package:`` starts in the kit's own weights; a hub id such as
    ``owner/name/unet``) or ``random``, ``told`` numbers that the network is told, ``networks`` further
    networks that guidance asks for, ``execution`` whether what guidance evaluates is one batched call or
    split, ``performance`` how the networks are run, ``cache`` a registered cache of what the network computes
    from step to step.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1, pattern=r"^[A-Za-z_][\w-]*$")
    size: int = Field(ge=1)
    schedule: Part
    prediction: str
    sigma_data: float = Field(0.5, gt=0)
    codec: CodecPart = CodecPart(name="pixel")
    denoiser: Part
    weights: str = "random"
    sampler: SamplerPart
    guidance: list[Part] = []
    networks: dict[str, NetworkSpec] = {}
    execution: Literal["batched", "split"] = "batched"
    low_res_level: float = Field(0.0, ge=0, le=1)
    low_res: LowResSpec = LowResSpec()
    text_encoder: Part | None = None
    told: ToldSpec = ToldSpec()
    performance: PerformanceSpec = PerformanceSpec()
    cache: Part | None = None


class RecipeSpec(BaseModel):
    """A whole recipe: a text encoder (or class labels in its place), the stages in order, how they are trained.

    Only a recipe that pretrains its text encoder (``train.task: text``) has no stages.

    ``unconditional`` is what guidance takes for "no text", as the denoisers were trained: the encoding of the
    empty prompt, or zeros. ``offload`` is what waits in main memory for its turn on the device: ``none``,
    ``model``: whole networks, or ``layers``: their blocks.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1)
    description: str = ""
    text_encoder: Part | None = None
    labels: LabelsSpec | None = None
    unconditional: Literal["empty", "zeros"] = "empty"
    offload: Literal["none", "model", "layers"] = "none"
    stages: list[StageSpec] = []
    train: dict[str, Any] | None = None


PART_KEYS = ("schedule", "codec", "denoiser", "sampler")
SWITCHES = ("compile", "quantise")  # of ``performance``: YAML reads a bare ``off`` as false


def normalise(data: dict[str, Any]) -> dict[str, Any]:
    """A copy in which parts given by bare names are maps: ``schedule: flow`` → ``schedule: {name: flow}``."""

    def part(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    out = dict(data)
    if "text_encoder" in out:
        out["text_encoder"] = part(out["text_encoder"])
    if isinstance(out.get("stages"), list):
        out["stages"] = [dict(stage) if isinstance(stage, dict) else stage for stage in out["stages"]]
        for stage in (stage for stage in out["stages"] if isinstance(stage, dict)):
            stage.update({key: part(stage[key]) for key in PART_KEYS if key in stage})
            for key in ("cache", "text_encoder"):
                if key in stage:
                    stage[key] = part(stage[key])
            if isinstance(stage.get("low_res"), dict) and "schedule" in stage["low_res"]:
                stage["low_res"] = {**stage["low_res"], "schedule": part(stage["low_res"]["schedule"])}
            if isinstance(stage.get("performance"), dict):
                stage["performance"] = {
                    key: "off" if key in SWITCHES and value is False else value
                    for key, value in stage["performance"].items()
                }
            if isinstance(stage.get("guidance"), list):
                stage["guidance"] = [part(item) for item in stage["guidance"]]
            if isinstance(stage.get("networks"), dict):
                stage["networks"] = {
                    name: {**network, "denoiser": part(network["denoiser"])}
                    if isinstance(network, dict) and "denoiser" in network
                    else network
                    for name, network in stage["networks"].items()
                }
    return out


def structure_faults(model: type[BaseModel], data: Any, prefix: str = "") -> Iterator[Fault]:
    """What pydantic finds wrong in ``data``, each with its dotted path, in file order."""
    try:
        # As JSON: a list then fits a tuple, as it must for YAML, while "3" still does not fit a number.
        model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            path = ".".join(map(str, (prefix, *entry["loc"]) if prefix else entry["loc"]))
            yield Fault(path, _unknown_key(model, entry) or plain(entry))


def plain(entry: Any) -> str:
    """One pydantic error as a plain rule with the value that breaks it."""
    kind, context, value = entry["type"], entry.get("ctx", {}), shorten(entry["input"])
    rules = {
        "missing": "is missing",
        "int_type": f"must be a whole number, not {value}",
        "int_from_float": f"must be a whole number, not {value}",
        "float_type": f"must be a number, not {value}",
        "bool_type": f"must be true or false, not {value}",
        "string_type": f"must be text, not {value}",
        "list_type": f"must be a list, not {value}",
        "tuple_type": f"must be a list, not {value}",
        "dict_type": f"must be a map, not {value}",
        "model_type": f"must be a map of keys (a part: its name, or a map with 'name'), not {value}",
        "greater_than_equal": f"must be at least {context.get('ge')}, not {value}",
        "greater_than": f"must be more than {context.get('gt')}, not {value}",
        "less_than_equal": f"must be at most {context.get('le')}, not {value}",
        "less_than": f"must be less than {context.get('lt')}, not {value}",
        "string_too_short": "must not be empty",
        "too_short": f"must have at least {context.get('min_length')} item(s)",
        "string_pattern_mismatch": f"must be letters, digits, - and _ beginning with a letter, not {value}",
    }
    kind = kind.replace("_parsing", "_type")
    if kind == "literal_error":
        guess = nearest(
            entry["input"], context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        )
        hint = f"; did you mean {guess!r}?" if guess else ""
        return f"must be {context['expected']}, not {value}{hint}"
    return rules.get(kind, f"{entry['msg']}, not {value}")


def shorten(value: Any) -> str:
    """The value's repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(model: type[BaseModel], entry: Any) -> str | None:
    """The line for a key that the model has not, with the nearest one that it has."""
    if entry["type"] != "extra_forbidden":
        return None
    holder: type[BaseModel] = model
    for step in entry["loc"][:-1]:
        if isinstance(step, str) and step in holder.model_fields:
            holder = _model_within(holder.model_fields[step].annotation) or holder
    key, fields = entry["loc"][-1], list(holder.model_fields)
    guess = nearest(key, fields)
    return (
        f"unknown key; did you mean {guess!r}?" if guess else f"unknown key; choose from {', '.join(fields)}"
    )


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_within(arg))), None)

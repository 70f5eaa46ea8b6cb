"""What is wrong with a recipe's parts: names, options, types of values, and whether the parts fit each other.

Nothing here reads or draws a weight: denoisers are built empty, larger ones on the meta device.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from imagen_kit.errors import Fault, KitError, unknown
from imagen_kit.recipe.spec import StageSpec, plain, shorten
from imagen_kit.registry import Registry

RUN_OPTIONS = {
    "sampler": ("steps",),
    "codec": ("weights",),
    "encoders": ("use",),
}  # keys of a part that are the stage's and not its constructor's
WIRED = (
    *(
        "in_channels",
        "image_size",
        "low_res_channels",
        "time_scale",
        "context_dim",
        "pooled_dim",
        "num_classes",
    ),
    *("schedule", "prediction"),  # only ideal denoisers ask for these
)
ASSUMED_TEXT_DIM = 64  # stands for the encoder's width, which is known only once the encoder is built


def registries() -> dict[str, Registry]:
    """The registry of each part that a recipe names, by the part's key."""
    from imagen_kit import caches, codecs, data, denoisers, guidance, samplers, schedules, text_encoders

    return {
        "data": data.registry,
        "text_encoder": text_encoders.registry,
        "schedule": schedules.registry,
        "codec": codecs.registry,
        "denoiser": denoisers.registry,
        "sampler": samplers.registry,
        "guidance": guidance.registry,
        "cache": caches.registry,
    }


def wired(
    registry: Registry, name: str, options: dict[str, Any], dimensions: dict[str, Any]
) -> dict[str, Any]:
    """``options`` with every dimension that the part ``name`` takes and the recipe does not give."""
    takes = inspect.signature(registry.get(name)).parameters
    return {**{key: value for key, value in dimensions.items() if key in takes}, **options}


def dimensions(stage: StageSpec, index: int) -> dict[str, Any]:
    """What the denoiser of stage ``index`` is told about its surroundings, but for the encoder's widths."""
    import torch

    from imagen_kit.hollow import hollow

    kinds = registries()
    with hollow():
        codec = kinds["codec"].create(stage.codec.name, **stage.codec.options)
    with torch.device("cpu"):  # its tables are read, also where the caller builds on the meta device
        schedule = kinds["schedule"].create(stage.schedule.name, **stage.schedule.options)
    return {
        "in_channels": codec.channels,
        "image_size": stage.size // codec.factor,
        "low_res_channels": getattr(codec, "picture_channels", codec.channels) if index else 0,
        # An edm network is told ln(sigma)/4 in place of native time, whatever the schedule.
        "time_scale": 1.0 if stage.prediction == "edm" else schedule.time_scale,
        "schedule": schedule,
        "prediction": stage.prediction,
    }


def low_res(stage: StageSpec) -> Any:
    """How the stage is shown the picture before it, a ``LowRes``; KitError where it cannot be so."""
    from imagen_kit.cascade import LowRes

    told = stage.low_res
    part = told.schedule
    schedule = None if part is None else registries()["schedule"].create(part.name, **part.options)
    return LowRes(schedule, told.align_corners, told.told)


def option_faults(registry: Registry, part: Any, path: str, given: tuple[str, ...] = ()) -> Iterator[Fault]:
    """Faults in one part's name, option names and value types; parts nested in options are checked alike.

    Args:
        registry: of the part's kind.
        part: the map from the recipe; anything else is a structural fault and passed over.
        path: of the part in the recipe.
        given: constructor arguments that are wired, and so are never missing.
    """
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        return
    name = part["name"]
    try:
        factory = registry.get(name)
    except KitError as error:
        yield Fault(f"{path}.name", str(error))
        return
    keys = inspect.signature(factory).parameters
    place = next((key for key in reversed(path.split(".")) if not key.isdecimal()), "")
    run_keys = RUN_OPTIONS.get(place, ())
    options = {key: value for key, value in part.items() if key != "name" and key not in run_keys}
    assumed = {key: None for key in given if key in keys}
    missing = registry.check(name, assumed)
    hints = _hints(factory)
    for key, value in options.items():
        here = f"{path}.{key}"
        bad_key = [line for line in registry.check(name, {**assumed, key: value}) if line not in missing]
        nested = value if isinstance(value, list) else [value]
        if bad_key:
            yield Fault(here, bad_key[0])
        elif any(isinstance(item, dict) and "name" in item for item in nested):
            for index, item in enumerate(nested):
                yield from option_faults(
                    registry, item, f"{here}.{index}" if isinstance(value, list) else here
                )
        elif key in hints:
            yield from value_faults(hints[key], value, here)
    still = registry.check(name, {**assumed, **options})
    yield from (Fault(path, line) for line in missing if line in still)


def value_faults(annotation: Any, value: Any, path: str) -> Iterator[Fault]:
    """Whether ``value`` is of the annotated type, where that is one that YAML can write."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=True))
        adapter.validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        entries = error.errors(include_url=False)
        if any(entry["type"] in ("callable_type", "is_instance_of") for entry in entries):
            return  # an object that only Python can make, or one of several forms: the constructor decides
        lines = list(dict.fromkeys(plain(entry) for entry in entries))
        if len(lines) > 1:  # a union: none of its members fitted
            lines = [f"must be {_spoken(annotation)}, not {shorten(value)}"]
        yield Fault(path, lines[0])
    except (PydanticUserError, TypeError, NameError):
        return  # not a type that pydantic knows


def construct(factory: Callable[[], Any], path: str) -> tuple[Any, list[Fault]]:
    """What ``factory`` returns, or None and the fault its constructor found."""
    try:
        return factory(), []
    except (KitError, ValueError, TypeError, AssertionError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return None, [Fault(path, text)]


def prediction_faults(prediction: str, path: str) -> Iterator[Fault]:
    """Whether there is such a prediction."""
    from imagen_kit.prediction import PREDICTIONS

    if prediction not in PREDICTIONS:
        yield Fault(path, unknown("prediction", prediction, PREDICTIONS))


def sampler_faults(sampler: Any, schedule: Any, stage: StageSpec, path: str) -> Iterator[Fault]:
    """Whether sampler, schedule and prediction fit: the tableau is traced with the stage's steps.

    The network's output must turn into a finite x0 at every time the tableau asks it for. Samplers that are
    not linear have no tableau and are not judged.
    """
    from imagen_kit.prediction import coefficients

    if not hasattr(sampler, "tableau"):
        return
    try:
        rows = sampler.tableau(schedule, stage.sampler.steps).rows
    except NotImplementedError:  # not linear: it samples in its own way
        return
    except KitError as error:
        yield Fault(f"{path}.sampler", str(error))
        return
    for t in (row.t for row in rows if row.t is not None):
        alpha, sigma = schedule.alpha_sigma(t)
        try:
            coefficients(stage.prediction, alpha, sigma, stage.sigma_data)
        except KitError as error:
            where = f"sampler {stage.sampler.name!r} goes to t={t:g} of schedule {stage.schedule.name!r}"
            yield Fault(f"{path}.prediction", f"{error} ({where})")
            return


def guidance_faults(
    strategies: Mapping[str, Any], sampler: Any, networks: Sequence[str], null: bool = True
) -> Iterator[Fault]:
    """Whether guidance finds the conditionings, the networks and the kind of sampler that it needs.

    Args:
        strategies: by their paths, in the order they act.
        sampler: the stage's, or None where it could not be made.
        networks: names of the stage's further networks.
        null: whether there is a conditioning for "no prompt"; some class-conditional models have none.
    """
    from imagen_kit.guidance.base import TEXT, renoised, require

    for path, strategy in strategies.items():
        try:
            asked = [branch.cond for branch in strategy.needs if branch.cond.startswith(TEXT)]
            if any(not name.removeprefix(TEXT).strip() for name in asked):
                yield Fault(path, f"the conditioning {TEXT!r} must be followed by a text")
            if not null and any(branch.cond in ("uncond", "null") for branch in strategy.needs):
                raise KitError("needs a class for 'no class', which this model has not (labels.null)")
            require(strategy, ["cond", "uncond", "null", *asked], networks)
            if sampler is not None:
                renoised(sampler, [strategy])
        except KitError as error:
            hint = f", or {TEXT} and a text" if "conditioning" in str(error) else ""
            yield Fault(path, str(error) + hint)


def denoiser_faults(
    registry: Registry,
    stage: StageSpec,
    index: int,
    path: str,
    text: Mapping[str, Any],
    strategies: Mapping[str, Any] | None = None,
) -> Iterator[Fault]:
    """What the denoiser's constructor and one forward pass object to, found without its weights.

    So is whether it has the layers that ``strategies``, guidance by path, change. ``text`` holds the widths
    or the number of classes that it is wired to.
    """
    from imagen_kit.hollow import sketched
    from imagen_kit.recipe.trial import evaluate, told_faults

    known = dimensions(stage, index)
    factory = registry.get(stage.denoiser.name)
    options = wired(registry, stage.denoiser.name, stage.denoiser.options, {**known, **text})
    try:
        module = sketched(partial(factory, **options))
        evaluate(module, stage, known, options, text.get("num_classes"))
        yield from told_faults(module, stage, path.replace("denoiser", "told"), text.get("num_classes"))
        for here, strategy in (strategies or {}).items():
            _, found = construct(partial(strategy.fit, module), here)
            yield from found
    except KitError as error:
        yield Fault(path, str(error))
    except NotImplementedError:
        return  # a part that cannot be tried without memory: real tensors will tell
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if "meta" not in line:
            yield Fault(path, f"{stage.denoiser.name}: {line}")


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError, AttributeError):
        return {}


def _spoken(annotation: Any) -> str:
    name = getattr(annotation, "__name__", "")
    text = name if inspect.isclass(annotation) and name else str(annotation)
    for long, short in (("typing.", ""), ("collections.abc.", ""), ("NoneType", "null"), ("None", "null")):
        text = text.replace(long, short)
    return text.replace(" | ", " or ")

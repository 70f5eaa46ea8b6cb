"""The rows of recipes: each whole, and its text encoders, denoisers and decoder by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagen_kit import recipe as recipes
from imagen_kit.bench import subjects
from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.subject import Case
from imagen_kit.recipe import Recipe

PROTOCOL = Protocol(warm_up=2, least=3, most=10, seconds=20.0)


def cases(
    name: str, *, weights: str = "real", dtype: str = "fp32", changes: Sequence[str] = ()
) -> tuple[list[Case], list[str]]:
    """(rows, what has none and why) of one recipe.

    A denoiser's row has two samples where the stage has guidance, as that evaluates two at once; parts have random
    weights, since no speed depends on their values.

    Args:
        name: a shipped recipe's, or a file.
        weights: of the whole recipe: real or random.
        dtype: of the denoisers.
        changes: assignments as ``--set`` takes them.

    Raises:
        KitError: the recipe's faults.
    """
    checked = recipes.load(name, changes)
    whole: dict[str, Any] = {"weights": weights, "dtype": dtype}
    if changes:
        whole["set"] = list(changes)
    found = [Case("recipe", name, {**whole, "batch": batch}) for batch in (1, 4)]
    left_out = []
    for part in (*_encoders(checked), *_stages(checked, dtype)):
        if isinstance(part, str):
            left_out.append(f"{name}: {part}")
        elif faults := subjects.check(part):
            left_out.append(f"{name}: {faults[0]}")
        else:
            found.append(part)
    return list({case.id: case for case in found}.values()), left_out


def _encoders(checked: Recipe) -> Iterator[Case | str]:
    """Each text encoder, those within others too; in words, one whose size has no name."""
    part = checked.spec.text_encoder
    if part is None:
        return
    inner = part.options.get("encoders")
    for options in inner if isinstance(inner, list) else [{"name": part.name, **part.options}]:
        named = options.get("name", "") if isinstance(options, Mapping) else str(options)
        size = options.get("size") if isinstance(options, Mapping) else None
        if size is None:
            yield f"text encoder {named!r} has no row of its own, its size has no name"
        else:
            length = options.get("max_length") or 77
            yield Case("text_encoder", named, {"size": size, "length": length})


def _stages(checked: Recipe, dtype: str) -> Iterator[Case]:
    encoder = checked.hollow_text_encoder()
    for index, stage in enumerate(checked.stages):
        built = checked.build_stage_parts(index, hollow=True)
        options = json.loads(json.dumps(checked.denoiser_options(index, encoder)))
        about: dict[str, Any] = {"resolution": stage.size // built["codec"].factor, "dtype": dtype}
        about["batch"] = 2 if built["guidance"] else 1
        length = getattr(encoder, "max_length", None)
        if length is not None:
            about["tokens"] = length
        yield Case("denoiser", stage.denoiser.name, {**about, "network": options})
        if stage.codec.name != "pixel":
            given = {"options": dict(stage.codec.options)} if stage.codec.options else {}
            yield Case(
                "codec",
                stage.codec.name,
                {"work": "decode", "resolution": stage.size, "dtype": dtype, **given},
            )

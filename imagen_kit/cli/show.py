"""``imagen-kit show``: a recipe with its sizes and costs, a part with its options, a sampler's tableau."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagen_kit.cli import common
from imagen_kit.cli.listing import find_kind, registry_of
from imagen_kit.errors import KitError

if TYPE_CHECKING:
    from imagen_kit.recipe import Part, Recipe


def show(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|KIND", help="A recipe, or a kind of part such as sampler.")
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The part's name, after a kind.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Print a sampler's tableau for this many steps.")
    ] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="Schedule the tableau is made for.")] = "flow",
    assignments: common.SetOption = None,
) -> None:
    """Show a recipe (parts, parameters, network evaluations), or one part (options, facts, tableau)."""
    if name is None:
        _print_recipe(common.load_recipe(target, assignments, steps=steps))
        return
    kind = find_kind(target)
    if kind == "recipes":
        _print_recipe(common.load_recipe(name, assignments, steps=steps))
        return
    if assignments:
        raise KitError("--set changes recipes; a part is shown as it is registered")
    if steps is not None and kind != "samplers":
        raise KitError(f"--steps goes with a sampler or a recipe, not with {target}")
    _print_part(registry_of(kind).describe(name))
    if steps is not None:
        _print_tableau(name, steps, schedule)


def _print_part(facts: dict[str, Any]) -> None:
    facts = dict(facts)
    typer.echo(f"{facts.pop('kind')} {typer.style(facts.pop('name'), bold=True)}: {facts.pop('summary')}")
    options = facts.pop("options")
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        typer.echo(f"  {key.replace('_', ' ')}: {text}")
    typer.echo("options" if options else "no options")
    width = max(map(len, options), default=0)
    for key, value in options.items():
        typer.echo(f"  {key:<{width}}  {value!r}")


def _print_tableau(name: str, steps: int, schedule_name: str) -> None:
    from imagen_kit import samplers, schedules

    sampler, schedule = samplers.create(name), schedules.create(schedule_name)
    try:
        tableau = sampler.tableau(schedule, steps)
    except (AttributeError, NotImplementedError):
        raise KitError(f"sampler {name!r} is not linear, so it has no tableau") from None
    typer.echo(
        f"{steps} steps on schedule {schedule_name}: {tableau.nfe} network evaluations, "
        f"order {tableau.order}, {len(tableau.rows)} rows"
    )
    for row in tableau.rows:
        typer.echo(f"  {row}")


def _print_recipe(recipe: Recipe) -> None:
    encoder, modules = _hollow(recipe)  # first: it may fail, and then nothing is printed
    typer.echo(f"{typer.style(recipe.name, bold=True)}: {recipe.spec.description}".rstrip(": "))
    typer.echo(f"text encoder  {_spoken(recipe.spec.text_encoder)}  {_size(encoder)}")
    total = 0
    for index, stage in enumerate(recipe.stages):
        calls, passes = _cost(recipe, index)
        total += calls * passes
        weights = "random weights" if stage.weights == "random" else stage.weights
        typer.echo(f"stage {typer.style(stage.name, bold=True)}  {stage.size}×{stage.size} px, {weights}")
        typer.echo(f"  denoiser    {_spoken(stage.denoiser)}  {_size(modules[index])}")
        typer.echo(f"  schedule    {_spoken(stage.schedule)}, prediction {stage.prediction}")
        typer.echo(f"  codec       {_spoken(stage.codec)}")
        typer.echo(f"  sampler     {_spoken(stage.sampler)}")
        typer.echo(f"  guidance    {', '.join(map(_spoken, stage.guidance)) or 'none'}")
        if index:
            typer.echo(f"  low-res     noise level {stage.low_res_level:g}")
        batch = f", each of {passes} pictures at once" if passes > 1 else ""
        typer.echo(f"  evaluations {calls}{batch}")
    if recipe.stages:
        typer.echo(f"network passes a picture: {total}")


def _hollow(recipe: Recipe) -> tuple[Any, list[Any]]:
    """Text encoder and denoisers without memory for their weights, to count parameters of any size."""
    import torch

    with torch.device("meta"):
        try:
            encoder = recipe.build_text_encoder()
        except (RuntimeError, KitError):  # loaders of existing weights refuse the meta device
            encoder = None
    encoder = recipe.build_text_encoder() if encoder is None else encoder
    with torch.device("meta"):
        return encoder, [
            recipe.build_stage_denoiser(i, encoder, weights=False) for i in range(len(recipe.stages))
        ]


def _cost(recipe: Recipe, index: int) -> tuple[int, int]:
    """(network calls a picture, pictures in each call where all guidance acts)."""
    parts, stage = recipe.build_stage_parts(index), recipe.stages[index]
    sampler = parts["sampler"]
    branches = {"cond"} | {branch.name for strategy in parts["guidance"] for branch in strategy.needs}
    try:
        calls = sampler.tableau(parts["schedule"], stage.sampler.steps).nfe
    except (AttributeError, NotImplementedError):
        calls = sampler.nfe(stage.sampler.steps)
    return calls, len(branches)


def _spoken(part: Part) -> str:
    options = part.model_dump(exclude={"name"}, exclude_none=True)
    return part.name + (
        f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
    )


def _size(module: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name} parameters"
    return f"{count} parameters"

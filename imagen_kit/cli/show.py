"""``imagen-kit show``: a recipe with sizes and costs, a part with its options, a sampler's tableau, a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagen_kit.cli import common
from imagen_kit.cli.listing import find_kind, registry_of
from imagen_kit.cli.show_checkpoint import show_checkpoint
from imagen_kit.cli.show_sampler import tableau_lines
from imagen_kit.errors import KitError

if TYPE_CHECKING:
    from imagen_kit.recipe import Part, Recipe


def show(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|KIND|checkpoint",
            help="A recipe, a kind of part such as sampler, or a checkpoint.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|PATH]", help="The part's name, after a kind; the checkpoint's path."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Print a sampler's tableau for this many steps.")
    ] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", help="The same for this many network evaluations.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a sampler's tableau to a picture.")
    ] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="Schedule the tableau is made for.")] = "flow",
    assignments: common.SetOption = None,
) -> None:
    """Show a recipe (parts, parameters, network evaluations), one part (options, facts, tableau), or what a
    checkpoint holds (format, size, parameters, FLOPs)."""
    if target == "checkpoint":
        if name is None:
            raise KitError("show checkpoint: give the path of a file or folder")
        show_checkpoint(name)
        return
    if name is None:
        _refuse("recipe", nfe=nfe, plot=plot)
        _print_recipe(common.load_recipe(target, assignments, steps=steps))
        return
    kind = find_kind(target)
    if kind == "recipes":
        _refuse("recipe", nfe=nfe, plot=plot)
        _print_recipe(common.load_recipe(name, assignments, steps=steps))
        return
    if kind != "samplers":
        _refuse(target, steps=steps, nfe=nfe, plot=plot)
    facts = registry_of(kind).describe(name)
    wanted = not (steps is None and nfe is None and plot is None)
    if assignments and not wanted:
        raise KitError("--set changes recipes, and samplers shown with --steps or --nfe")
    lines = tableau_lines(name, steps, nfe, schedule, assignments or (), plot) if wanted else []
    _print_part(facts)
    for line in lines:
        typer.echo(line)


def _refuse(target: str, **options: Any) -> None:
    """KitError for an option that only samplers have."""
    for option, value in options.items():
        if value is not None:
            raise KitError(f"--{option} goes with a sampler, not with a {target}")


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


def _print_recipe(recipe: Recipe) -> None:
    from imagen_kit.cli.show_guidance import cost
    from imagen_kit.performance.options import Performance

    encoders, modules = _hollow(recipe)  # first: it may fail, and then nothing is printed
    typer.echo(f"{typer.style(recipe.name, bold=True)}: {recipe.spec.description}".rstrip(": "))
    labels, text = recipe.spec.labels, recipe.spec.text_encoder
    if labels is not None:
        typer.echo(f"labels        {labels.classes} classes" + (", and one for none" if labels.null else ""))
    elif text is not None:
        typer.echo(f"text encoder  {_spoken(text)}  {_size(encoders[0])}")
    total = 0
    for index, stage in enumerate(recipe.stages):
        parts = recipe.build_stage_parts(index, hollow=True)
        spent = cost(parts["sampler"], parts["schedule"], stage.sampler.steps, parts["guidance"])
        total += sum(spent.passes)
        weights = "random weights" if stage.weights == "random" else stage.weights
        typer.echo(f"stage {typer.style(stage.name, bold=True)}  {stage.size}×{stage.size} px, {weights}")
        encoder = encoders[index + 1]
        sizes = _size(modules[index]) + _cost(recipe, index, encoder, modules[index])
        if stage.text_encoder is not None:
            typer.echo(f"  text        {_spoken(stage.text_encoder)}  {_size(encoder)}")
        typer.echo(f"  denoiser    {_spoken(stage.denoiser)}  {sizes}")
        typer.echo(f"  schedule    {_spoken(stage.schedule)}, prediction {stage.prediction}")
        size = f"  {_size(parts['codec'])}" if hasattr(parts["codec"], "parameters") else ""
        typer.echo(f"  codec       {_spoken(stage.codec)}{size}")
        typer.echo(f"  sampler     {_spoken(stage.sampler)}")
        typer.echo(f"  guidance    {', '.join(map(_spoken, stage.guidance)) or 'none'}")
        if index:
            noising = stage.low_res.schedule
            by = "" if noising is None else f" of {_spoken(noising)}, told as {stage.low_res.told}"
            typer.echo(f"  low-res     noise level {stage.low_res_level:g}{by}")
        if run := Performance(**stage.performance.model_dump()).words():
            typer.echo(f"  run         {run}")
        if stage.cache is not None:
            typer.echo(f"  cache       {_spoken(stage.cache)}")
        for key, value in stage.told.model_dump(exclude_none=True).items():
            typer.echo(f"  told        {key} {value}")
        for network, part in stage.networks.items():
            typer.echo(f"  network     {network}: {_spoken(part.denoiser)}, {part.weights} weights")
        typer.echo(f"  evaluations {spent}")
    if recipe.spec.offload != "none":
        typer.echo(f"offload       {recipe.spec.offload}")
    if recipe.stages:
        typer.echo(f"network passes a picture: {total}")


def _hollow(recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """Text encoders (the recipe's, then each stage's) and denoisers without memory, to count any size."""
    from imagen_kit.hollow import sketched

    first = recipe.hollow_text_encoder()
    encoders = [
        first if stage.text_encoder is None else recipe.hollow_text_encoder(i)
        for i, stage in enumerate(recipe.stages)
    ]
    build = partial(recipe.build_stage_denoiser, weights=False)
    return [first, *encoders], [sketched(partial(build, i, encoder)) for i, encoder in enumerate(encoders)]


def _cost(recipe: Recipe, index: int, encoder: Any, module: Any) -> str:
    from imagen_kit.recipe import check, trial

    stage, labels = recipe.stages[index], recipe.spec.labels
    known, options = check.dimensions(stage, index), recipe.denoiser_options(index, encoder)
    classes, tokens = (None, encoder.max_length) if labels is None else (labels.classes, 0)
    count = trial.flops(module, stage, known, options, classes, tokens)
    return "" if count is None else f", {_short(count, 'FLOP')} an evaluation"


def _spoken(part: Part) -> str:
    options = part.model_dump(exclude={"name"}, exclude_none=True)
    return part.name + (
        f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
    )


def _size(module: Any) -> str:
    return _short(sum(parameter.numel() for parameter in module.parameters()), "parameters")


def _short(count: int, what: str) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            text = f"{count / unit:.3g} {name}"
            return f"{text}{what}" if what == "FLOP" else f"{text} {what}"
    return f"{count} {what}"

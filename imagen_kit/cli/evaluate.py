"""``imagen-kit evaluate``: how often a recipe draws what the caption says, by the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from imagen_kit.cli import common
from imagen_kit.errors import KitError, unknown
from imagen_kit.files import replacing, require_writable

LANGUAGES = ("en", "zh")
SPLITS = ("train", "held_out", "all")


@common.interruptible(
    lambda _: "nothing was written; the same command begins anew, and a smaller -n ends sooner"
)
def evaluate(
    recipe: common.RecipeArgument,
    count: Annotated[int, typer.Option("-n", "--num", help="Captions in each language.")] = 200,
    languages: Annotated[str, typer.Option("--languages", help="Comma-separated: en, zh.")] = "en,zh",
    split: Annotated[
        str, typer.Option("--split", help="Attribute combinations: held_out, train or all.")
    ] = "held_out",
    sampler: common.SamplerOption = None,
    steps: common.StepsOption = None,
    guidance: common.GuidanceOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of captions and pictures.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures at a time.")] = 50,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A JSON file.")
    ] = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = "fp32",
    assignments: common.SetOption = None,
) -> None:
    """Draw captions of the pocket world and let the judge read them back."""
    common.check_whole("--num", count, 1, common.MOST_PICTURES)
    common.check_whole("--batch-size", batch_size, 1, common.MOST_PICTURES)
    common.check_whole("--seed", seed, 0, common.MOST_SEED)
    if split not in SPLITS:
        raise KitError("--split: " + unknown("split", split, SPLITS))
    chosen = parse_languages(languages)
    if output is not None:
        require_writable(output)
    scale = common.check_guidance(guidance)
    checked = common.load_recipe(recipe, assignments, sampler, steps)
    pipeline = common.build(checked, device, dtype)
    from imagen_kit.evaluation import pocket

    report = pocket.evaluate(
        pipeline,
        n=count,
        languages=chosen,
        split=split,
        seed=seed,
        batch_size=batch_size,
        guidance=scale,
        progress=True,
    )
    text = json.dumps({"recipe": checked.name, **report}, indent=2, ensure_ascii=False)
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


def parse_languages(text: str) -> tuple[str, ...]:
    """``"en,zh"`` → ("en", "zh"); KitError for a language without captions."""
    chosen = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in chosen:
        if word not in LANGUAGES:
            raise KitError("--languages: " + unknown("language", word, LANGUAGES))
    if not chosen:
        raise KitError(f"--languages is empty; choose from {', '.join(LANGUAGES)}")
    return chosen

"""The words that ``imagen-kit compare`` takes, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PICTURES, SAMPLES = 50, 1000  # of a cell, by default

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE|analytic:PROBLEM",
        help="A shipped recipe, a YAML file, or a problem with a known answer: "
        "analytic:gmm2d, gmm_image, gaussian, points.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="For results.json, report.html and tradeoff.png."),
]
Samplers = Annotated[
    str, typer.Option("--samplers", help="Comma-separated; with options as in ddim:eta=1:spacing=karras.")
]
Caches = Annotated[
    str | None,
    typer.Option(
        "--caches",
        help="Step caches to draw with each sampler: none,deep_cache:every=3,first_block; the recipe's by default.",
    ),
]
Steps = Annotated[str | None, typer.Option("--steps", help="Comma-separated; 5,10,20 by default.")]
Nfe = Annotated[
    str | None,
    typer.Option("--nfe", help="Budgets in network evaluations instead of steps, comma-separated."),
]
Guidance = Annotated[
    str | None,
    typer.Option("--guidance", help="Comma-separated scales of the first stage; the recipe's by default."),
]
Seeds = Annotated[
    str, typer.Option("--seeds", "--seed", help="Comma-separated: each repeats all with other noise.")
]
Spacing = Annotated[
    str | None, typer.Option("--spacing", help="Time grid of all samplers; the recipe's by default.")
]
Schedule = Annotated[
    str, typer.Option("--schedule", help="Of an analytic problem, e.g. edm or flow:shift=3.")
]
Count = Annotated[
    int | None,
    typer.Option("-n", "--num", help=f"Pictures ({PICTURES}) or samples ({SAMPLES}) at each setting."),
]
Language = Annotated[str, typer.Option("--language", help="Of the captions: en or zh.")]
Split = Annotated[str, typer.Option("--split", help="Of the captions: held_out, train or all.")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="One a line, in place of captions.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures at a time.")]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", help="What counts as converged: SAMPLER@STEPS (dpmpp_3m@128), or exact (analytic)."
    ),
]
Features = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="For FID, KID, precision and recall: judge, pixels, timm:MODEL@FILE, open_clip:MODEL@FILE, "
        "none; the judge's by default for captions.",
    ),
]
Data = Annotated[
    str | None, typer.Option("--data", help="What they compare with: pocket, or folder:path=DIR.")
]
Real = Annotated[
    int | None, typer.Option("--data-num", help="Most real pictures or samples to compare with.")
]
Lpips = Annotated[
    Path | None,
    typer.Option("--lpips", metavar="FILE", help="LPIPS with these torchvision weights of alexnet or vgg16."),
]
Shown = Annotated[int, typer.Option("--thumbnails", help="Pictures of each setting in the report.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="[QUALITY=]VALUE",
        help="Say what is cheapest for this; repeatable, e.g. fid=20.",
    ),
]
Redraw = Annotated[
    Path | None,
    typer.Option("--redraw", metavar="DIR", help="Only draw report and plot again from DIR's results."),
]

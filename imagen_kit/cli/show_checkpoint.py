"""``imagen-kit show checkpoint PATH``: what a checkpoint holds and costs."""

from __future__ import annotations

from typing import Any

import typer


def show_checkpoint(path: str) -> None:
    """Print format, size, parameters, dtype and FLOPs of the checkpoint at ``path``."""
    from imagen_kit.checkpoints.facts import describe

    facts = describe(path)
    origin = facts.origin
    typer.echo(f"checkpoint {typer.style(path, bold=True)}")
    rows: list[tuple[str, Any]] = [
        ("format", origin.format or "ours"),
        (origin.kind.replace("_", " "), origin.part),
        ("size", facts.size or "none of the named ones"),
        ("parameters", f"{_short(facts.parameters)} ({facts.parameters:,})"),
        ("dtype", ", ".join(facts.dtypes)),
        ("tensors", f"{facts.bytes / 2**20:,.1f} MiB"),
        ("FLOPs", "unknown" if facts.flops is None else f"{_short(facts.flops)} for {facts.evaluation}"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")
    typer.echo("options")
    options = origin.arguments()
    width = max(map(len, options), default=0)
    for key, value in options.items():
        typer.echo(f"  {key:<{width}}  {value!r}")


def _short(count: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return str(count)

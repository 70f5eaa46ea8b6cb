"""``imagen-kit show sampler``: the tableau of a sampler, in words, numbers and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagen_kit.errors import KitError


def tableau_lines(
    name: str,
    steps: int | None = None,
    nfe: int | None = None,
    schedule_name: str = "flow",
    assignments: Sequence[str] = (),
    plot: Path | None = None,
) -> list[str]:
    """A sampler's tableau and what it says about the sampler, line by line; drawn where ``plot`` is given.

    Args:
        name: of the sampler, or an alias.
        steps, nfe: how long the run is, in steps or in network evaluations; the sampler's default steps.
        schedule_name: schedule the tableau is made for, with its defaults.
        assignments: ``option=value`` for the sampler.
        plot: file to draw to; its suffix decides the format.

    Raises:
        KitError: unknown names, options that the sampler lacks, steps that cannot be, a sampler that is not
            linear, a format that cannot be drawn.
    """
    from imagen_kit import samplers, schedules
    from imagen_kit.recipe.check import option_faults
    from imagen_kit.recipe.source import override
    from imagen_kit.samplers import drawing
    from imagen_kit.samplers.stability import stability

    part = override({"name": name}, assignments)
    for fault in option_faults(samplers.registry, part, "sampler"):
        raise KitError(str(fault))
    sampler, schedule = samplers.create(**part), schedules.create(schedule_name)
    tableau = sampler.tableau(schedule, steps, nfe=nfe)
    count = len(tableau.times) - 1
    run = f"{count} step{'s' if count > 1 else ''} on schedule {schedule_name}"
    noise = f"stochastic ({tableau.noises} noise terms)" if tableau.noises else "deterministic"
    lines = [
        f"{run}: {tableau.nfe} network evaluations, order {tableau.order}, {noise}, {len(tableau.rows)} rows",
        f"stability: {stability(tableau, schedule)}",
    ]
    for row in tableau.rows:
        lines.append(f"  {row}{'' if row.step is None else f'   (ends step {row.step + 1})'}")
    if plot is not None:
        drawing.save(tableau, schedule, f"{name}, {run}", plot)
        lines.append(f"drawn to {plot}")
    return lines

"""Errors a user can mend: one plain line that names the thing, the rule and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class KitError(ValueError):
    """Bad input. The command line prints the message on stderr and exits with code 2, without a traceback."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a recipe: where it stands (``stages.0.denoiser.depth``) and the rule it breaks."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(KitError):
    """All faults of one recipe, found before any weight is loaded.

    Args:
        source: name or file of the recipe.
        faults: every fault found, in file order.
    """

    def __init__(self, source: str, faults: Iterable[Fault]):
        self.source = source
        self.faults = list(faults)
        super().__init__(f"recipe {source}: " + "; ".join(map(str, self.faults)))


def nearest(name: object, choices: Iterable[str]) -> str | None:
    """The valid name closest to ``name``, or None when nothing is close."""
    pool = [str(choice) for choice in choices]
    folded = {choice.lower().replace("-", "_"): choice for choice in pool}
    key = str(name).lower().replace("-", "_").replace(" ", "_")
    if key in folded:
        return folded[key]
    close = difflib.get_close_matches(key, folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def unknown(kind: str, name: object, choices: Iterable[str]) -> str:
    """``unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'?``, or the list of choices when nothing is near."""
    pool = sorted(map(str, choices))
    guess = nearest(name, pool)
    if guess is not None:
        return f"unknown {kind} {str(name)!r}; did you mean {guess!r}?"
    return f"unknown {kind} {str(name)!r}; choose from {', '.join(pool) or '(none registered)'}"

"""What samplers share that are not linear in the network's answers, and so have no tableau."""

from __future__ import annotations

from imagen_kit.errors import KitError


class NoTableau(KitError, NotImplementedError):
    """A tableau was asked for of a sampler that has none."""


def no_tableau(name: str, why: str) -> NoTableau:
    """The error for sampler ``name``, which ``why``."""
    return NoTableau(f"sampler {name!r} {why}: it has no tableau and runs by sample() only")

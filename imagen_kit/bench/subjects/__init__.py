"""Kinds of subject by name, one file each. A kind is a function that builds a case's subjects::

    @register("denoiser", names=lambda: [...])        # () -> the names that a case of this kind may have
    def denoiser(name: str, device: torch.device, *, batch: int = 1, dtype: str = "fp32") -> Built:
        return {"imagen_kit": ..., "diffusers": ...}   # Subject or Unavailable, the kit's first

Its keyword arguments are the options that a suite may set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagen_kit.bench.subject import Built, Case
from imagen_kit.errors import KitError, unknown
from imagen_kit.registry import Registry

if TYPE_CHECKING:
    import torch

_registry = Registry("bench kind", __name__)
names, register, describe = _registry.names, _registry.register, _registry.describe


def check(case: Case) -> list[str]:
    """What is wrong with a case, as plain lines; [] when it can be built.

    Raises:
        KitError: unknown kind.
    """
    facts = describe(case.kind)
    choices = facts["names"]() if "names" in facts else None
    lines = [] if choices is None or case.name in choices else [unknown(case.kind, case.name, choices)]
    lines += _registry.check(case.kind, {"name": case.name, "device": None, **case.options})
    return [line.replace(f"bench kind '{case.kind}'", f"a {case.kind} case") for line in lines]


def build(case: Case, device: torch.device) -> Built:
    """Who does the case's work: ``imagen_kit`` first, then peers, with the same weights and inputs where possible.

    Raises:
        KitError: unknown kind, name or option.
    """
    if faults := check(case):
        raise KitError(faults[0])
    return _registry.get(case.kind)(case.name, device, **case.options)

"""Registry of samplers: ``create``, ``names``, ``register`` and ``describe``."""

from collections.abc import Callable
from typing import Any, TypeVar

from imagen_kit.registry import Aliases, Registry

T = TypeVar("T", bound=Callable[..., Any])


def _aliases() -> Aliases:
    from imagen_kit.samplers.aliases import ALIASES

    return ALIASES


registry = Registry("sampler", __name__, _aliases)
create = registry.create
names = registry.names
describe = registry.describe


def register(name: str, *, linear: bool | str = True, **facts: Any) -> Callable[[T], T]:
    """Decorator that adds a sampler under ``name``.

    Args:
        name: ours.
        linear: whether (or when) its updates are linear in x, x0 and noise, so that it has a tableau.
        facts: order, stochastic, evaluations: what ``describe`` shows besides.
    """
    return registry.register(name, **facts, linear=linear)

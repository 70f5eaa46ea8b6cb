"""One registry class for every kind of part.

A package such as ``imagen_kit.samplers`` holds one ``Registry`` and exposes its ``create``, ``names``,
``register`` and ``describe``. The registry imports the package's own modules the first time it is asked, so a
new part is one new file; other distributions add theirs through an entry point in the group
``imagen_kit.<package>`` (its value a module to import, or the part itself).
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from imagen_kit.errors import KitError, nearest, unknown

T = TypeVar("T", bound=Callable[..., Any])
#: Names that parts have elsewhere → (our name, the options that make it that part).
Aliases = Mapping[str, tuple[str, dict[str, Any]]]


class Registry:
    """Names → factories of one kind of part.

    Args:
        kind: singular noun for messages, e.g. ``"sampler"``.
        package: dotted name of the package whose modules define the parts.
        aliases: () -> what further names stand for; asked when a name is not registered.
    """

    def __init__(self, kind: str, package: str, aliases: Callable[[], Aliases] = dict):
        self.kind = kind
        self.package = package
        self._aliases = aliases
        self._factories: dict[str, Callable[..., Any]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._discovered = False

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Decorator that adds a class or function under ``name``; ``facts`` are shown by ``describe``.

        Raises:
            KitError: the name is taken by another part.
        """

        def add(factory: T) -> T:
            known = self._factories.get(name)
            same = known is not None and (known.__module__, known.__qualname__) == (
                factory.__module__,
                factory.__qualname__,
            )
            if known is not None and not same:
                raise KitError(
                    f"{self.kind} name {name!r} is taken by {known.__module__}.{known.__qualname__}; "
                    f"choose another name for {factory.__module__}.{factory.__qualname__}"
                )
            self._factories[name] = factory
            self._facts[name] = facts
            return factory

        return add

    def get(self, name: str) -> Callable[..., Any]:
        """The class or function of the part ``name``; KitError with the nearest name otherwise."""
        return self._factories[self.resolve(name)[0]]

    def resolve(self, name: str) -> tuple[str, dict[str, Any]]:
        """(registered name, options it implies) of a name or an alias; KitError with the nearest otherwise.

        A registered name implies no options. Aliases are found whatever the case of their letters.
        """
        self._discover()
        if isinstance(name, str) and name in self._factories:
            return name, {}
        aliases = self._aliases()
        if isinstance(name, str):
            found = aliases.get(name) or aliases.get({k.lower(): k for k in aliases}.get(name.lower(), ""))
            if found:
                return found[0], dict(found[1])
        every = [*self._factories, *aliases]
        raise KitError(unknown(self.kind, name, every if nearest(name, every) else self._factories))

    def create(self, name: str, **config: Any) -> Any:
        """Build the part ``name`` from flat keyword arguments, which go before those an alias implies.

        Raises:
            KitError: unknown name, unknown or missing argument (with the nearest valid one).
        """
        known, implied = self.resolve(name)
        fault = self.check(name, config)
        if fault:
            raise KitError(fault[0])
        return self._factories[known](**{**implied, **config})

    def check(self, name: str, config: dict[str, Any]) -> list[str]:
        """What is wrong with the argument names of ``config`` for ``name``, as plain lines; [] when right."""
        known, implied = self.resolve(name)
        parameters = inspect.signature(self._factories[known]).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return []
        lines = []
        for key in config:
            if key not in parameters:
                guess = nearest(key, parameters)
                hint = f"did you mean {guess!r}?" if guess else f"it takes {', '.join(parameters) or 'none'}"
                lines.append(f"{self.kind} {name!r} has no option {key!r}; {hint}")
        for key, parameter in parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
            if needed and key not in config and key not in implied:
                lines.append(f"{self.kind} {name!r} needs the option {key!r}")
        return lines

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names matching a shell pattern, sorted; no aliases."""
        self._discover()
        return sorted(fnmatch.filter(self._factories, pattern))

    def describe(self, name: str) -> dict[str, Any]:
        """``name``, ``kind``, ``summary`` (docstring's first line), ``module``, ``options`` and facts.

        An alias is described by the part it stands for, with the options it implies in place of the defaults.
        """
        name, implied = self.resolve(name)
        factory = self._factories[name]
        options = {
            key: implied.get(key, None if p.default is p.empty else p.default)
            for key, p in inspect.signature(factory).parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        summary = (inspect.getdoc(factory) or "").split("\n", 1)[0]
        return {
            "name": name,
            "kind": self.kind,
            "summary": summary,
            "module": factory.__module__,
            "options": options,
            **self._facts[name],
        }

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # set first: modules may ask the registry while they are imported
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            try:
                part = point.load()
            except Exception as error:
                raise KitError(
                    f"{self.kind} plug-in {point.name!r} ({point.value}) does not load: {error}"
                ) from error
            if callable(part) and point.name not in self._factories:
                self.register(point.name)(part)

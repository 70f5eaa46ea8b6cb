"""What a checkpoint format is, and finding the one a file is in."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagen_kit.checkpoints.rules import Rule, fill, matches
from imagen_kit.errors import KitError, nearest, unknown

KINDS = ("denoiser", "codec", "text_encoder")
LAYOUTS = ("official", "diffusers")
Config = Mapping[str, Any]


class Shapes(Mapping[str, tuple[int, ...]]):
    """Tensor names → shapes of a file; asking for a tensor it lacks is a KitError that names it."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], whole: Shapes | None = None):
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.whole = whole or self  # of the file, where these are a part of it

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            guess = nearest(name, self._shapes)
            hint = f" (there is {guess})" if guess else ""
            raise KitError(f"missing tensor {name}{hint}, which tells the network's size")
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def get(self, name: str, default: Any = None) -> Any:
        """The shape, or ``default``."""
        return self._shapes.get(name, default)

    def has(self, template: str) -> bool:
        """Whether some tensor fits the template (see ``rules``)."""
        if "{" not in template:
            return template in self._shapes
        return any(matches(template, name) is not None for name in self._shapes)

    def count(self, template: str, letter: str = "i") -> int:
        """How many different numbers stand at ``{i}``: ``count("blocks.{i}.{rest}")`` is the depth."""
        found = (matches(template, name) for name in self._shapes)
        return len({values[letter] for values in found if values is not None})


def _no_rules(kwargs: Mapping[str, Any]) -> list[Rule]:
    return []


@dataclass(frozen=True)
class Format:
    """One way in which a community stores one architecture.

    Attributes:
        name: ``architecture_community``, e.g. ``dit_official``.
        kind: registry of the part: ``denoiser``, ``codec`` or ``text_encoder``.
        part: name in that registry.
        layout: ``official``, or ``diffusers`` for the folders of diffusers and transformers: what
            ``imagen-kit convert --to`` chooses by.
        configure: (shapes, config) → the part's constructor arguments. ``config`` is the community's own
            config (config.json) where there is one, else None: then sizes are read off the shapes, and what
            shapes do not tell comes from the published models. A key that begins with an underscore is for
            ``rules`` and ``config`` alone and not given to the constructor; of these, ``_size`` is the side of x
            that the network was trained at, which ``imagen-kit show checkpoint`` counts FLOPs for.
        rules: those arguments → the rules between the file's tensors and the module's. KitError where the
            format has no way to say them.
        config: those arguments → the config to write beside the tensors (diffusers layout); None without.
        has: templates of tensors that every such file holds and that tell it apart ({i} and the like as in
            ``rules``).
        lacks: templates of tensors that no such file holds.
        classes: names of the community's classes, as ``_class_name`` or ``architectures`` in its config.json.
            The first is the one written.
        prefixes: where the tensors stand in files of whole systems: ``("", "first_stage_model.")``.
        aliases: (template, template): other names that tensors have in some files, and their name in the others.
    """

    name: str
    kind: str
    part: str
    layout: str
    configure: Callable[[Shapes, Config | None], dict[str, Any]]
    rules: Callable[[Mapping[str, Any]], Sequence[Rule]] = _no_rules
    config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    aliases: tuple[tuple[str, str], ...] = ()

    def names_in(self, names: Iterable[str], prefix: str = "") -> dict[str, str]:
        """The format's name → the file's, of those of the file's tensors that stand below ``prefix``."""
        cut = len(prefix)
        here = {name[cut:]: name for name in names if name.startswith(prefix)}
        if not self.aliases:
            return here
        out = {}
        for name, full in here.items():
            found = ((matches(old, name), new) for old, new in self.aliases)
            usual = next((fill(new, values) for values, new in found if values is not None), name)
            out[name if usual in here else usual] = full
        return out

    def view(self, shapes: Shapes, prefix: str = "") -> Shapes:
        """The shapes below ``prefix`` under the format's names."""
        return Shapes({name: shapes[full] for name, full in self.names_in(shapes, prefix).items()}, shapes)

    def fits(self, shapes: Shapes) -> bool:
        """Whether a file with these tensors (prefix taken off) is in this format."""
        return all(map(shapes.has, self.has)) and not any(map(shapes.has, self.lacks))


@dataclass(frozen=True)
class Found:
    """A format recognised in a file, and the prefix its tensors have there."""

    format: Format
    prefix: str = ""


_formats: dict[str, Format] = {}
_discovered = False


def register(format: Format) -> Format:
    """Add a format; KitError when its name is taken or its kind or layout is not one there is."""
    if format.kind not in KINDS:
        raise KitError(unknown("kind of checkpoint", format.kind, KINDS))
    if format.layout not in LAYOUTS:
        raise KitError(unknown("checkpoint layout", format.layout, LAYOUTS))
    if format.name in _formats:
        raise KitError(f"checkpoint format {format.name!r} is registered twice; choose another name")
    _formats[format.name] = format
    return format


def names() -> list[str]:
    """Names of all formats, sorted."""
    _discover()
    return sorted(_formats)


def get(name: str) -> Format:
    """The format called ``name``; KitError with the nearest name otherwise."""
    _discover()
    if name not in _formats:
        raise KitError(unknown("checkpoint format", name, _formats))
    return _formats[name]


def detect(
    shapes: Mapping[str, Sequence[int]], config: Config | None = None, kind: str | None = None
) -> Found:
    """The format of a file with these tensors.

    Args:
        shapes: names and shapes of all its tensors.
        config: the community's config, where there is one; a class named in it decides.
        kind: what is looked for in the file of a whole system; by default the denoiser if there is one, else
            the codec, else the text encoder.

    Raises:
        KitError: no format fits, naming the nearest and what it lacks; or several do.
    """
    _discover()
    if kind is not None and kind not in KINDS:
        raise KitError(unknown("kind of checkpoint", kind, KINDS))
    pool = [f for f in _formats.values() if kind in (None, f.kind)]
    named = class_names(config)
    pool = [f for f in pool if named & set(f.classes)] or pool
    views = _views(pool, Shapes(shapes))
    fitting = [found for found, view in views if found.format.fits(view)]
    for wanted in KINDS:
        found = [f for f in fitting if f.format.kind == wanted]
        if len(found) > 1:
            raise KitError(
                f"the tensors fit several formats ({', '.join(f.format.name for f in found)}); name one"
            )
        if found:
            return found[0]
    return _nearest(views)


def located(shapes: Mapping[str, Sequence[int]], format: Format) -> Found:
    """Where in a file the tensors of ``format`` stand: the first of its prefixes with which it fits."""
    views = _views([format], Shapes(shapes))
    return next((found for found, view in views if format.fits(view)), None) or _nearest(views)


def class_names(config: Config | None) -> set[str]:
    """The community's class names in a config.json."""
    config = config or {}
    name = config.get("_class_name")
    return {*(config.get("architectures") or ()), *([name] if isinstance(name, str) else [])}


def _views(pool: Sequence[Format], shapes: Shapes) -> list[tuple[Found, Shapes]]:
    return [
        (Found(f, prefix), f.view(shapes, prefix))
        for f in pool
        for prefix in f.prefixes
        if any(name.startswith(prefix) for name in shapes)
    ]


def _nearest(views: Sequence[tuple[Found, Shapes]]) -> Found:
    """The one format most of whose signature is there: a damaged file then gets a full list of its faults."""
    best, share = None, 0.0
    for found, view in views:
        has = found.format.has
        if not any(map(view.has, found.format.lacks)):
            there = sum(map(view.has, has)) / max(1, len(has))
            if there > share:
                best, share = found, there
    if best is not None and share >= 0.5:
        return best
    known = sorted({f.part for f in _formats.values()})
    raise KitError(
        "the tensors are of no architecture known here"
        + (f"; the nearest format is {best.format.name}" if best else "")
        + f" (architectures: {', '.join(known)})"
    )


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True  # set first: the modules import this one
    package = importlib.import_module("imagen_kit.checkpoints")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"imagen_kit.checkpoints.{module.name}")

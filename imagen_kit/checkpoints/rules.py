"""How the tensors of a community's file are named and shaped in ours, and back: bit for bit, both ways.

A rule speaks of tensors by templates. ``{i}``, or any other single letter, stands for a number; a longer word
such as ``{part}`` for one segment without dots; ``{rest}`` for a tail with dots. The same placeholders stand on
both sides. A tensor that no rule names keeps its name, so a file whose names are ours needs no rules at all.

    Rename("down_blocks.{i}.{rest}", "down.{i}.{rest}")
    Concat(["attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"], "attn.qkv.weight")

An exact name goes before a template; among templates the first that fits is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from imagen_kit.errors import KitError

Function = Callable[..., "Tensor | Sequence[Tensor]"]


def _same(x: Tensor) -> Tensor:
    return x


class Rule:
    """Some tensors of a file and the tensors of ours that they are.

    Args:
        foreign: name templates in the file.
        ours: name templates in the module's state dict.
        forward: the tensors named in ``foreign`` → those named in ``ours``; it only moves numbers about.
        inverse: its exact inverse.
    """

    def __init__(
        self, foreign: str | Sequence[str], ours: str | Sequence[str], forward: Function, inverse: Function
    ):
        self.foreign = (foreign,) if isinstance(foreign, str) else tuple(foreign)
        self.ours = (ours,) if isinstance(ours, str) else tuple(ours)
        self.forward, self.inverse = forward, inverse

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.foreign)} ↔ {', '.join(self.ours)})"


class Rename(Rule):
    """The same tensor under another name."""

    def __init__(self, foreign: str, ours: str):
        super().__init__(foreign, ours, _same, _same)


class Concat(Rule):
    """Several tensors of the file are one of ours, joined along ``dim`` (q, k, v → qkv).

    Args:
        foreign: templates of the parts, in order.
        ours: template of the whole.
        dim: axis they are joined along.
        sizes: their lengths on it; equal by default.
    """

    def __init__(self, foreign: Sequence[str], ours: str, dim: int = 0, sizes: Sequence[int] | None = None):
        cut = _cutter(len(foreign), dim, sizes)
        super().__init__(foreign, ours, lambda *parts: torch.cat(parts, dim), cut)


class Split(Rule):
    """One tensor of the file is several of ours, cut along ``dim``; the arguments are those of ``Concat``."""

    def __init__(self, foreign: str, ours: Sequence[str], dim: int = 0, sizes: Sequence[int] | None = None):
        cut = _cutter(len(ours), dim, sizes)
        super().__init__(foreign, ours, cut, lambda *parts: torch.cat(parts, dim))


class Reshape(Rule):
    """The same numbers in another shape, e.g. a 1×1 convolution (o, i, 1, 1) that is a linear layer (o, i).

    Args:
        foreign, ours: the templates.
        foreign_shape, ours_shape: the shapes with -1 for any length, in which a 0 keeps the length of the same
            axis on the other side: ``Reshape("conv.weight", "linear.weight", (0, 0, 1, 1), (0, 0))``.
    """

    def __init__(self, foreign: str, ours: str, foreign_shape: Sequence[int], ours_shape: Sequence[int]):
        super().__init__(foreign, ours, _reshaper(ours_shape), _reshaper(foreign_shape))


class SwapHalves(Rule):
    """The two halves along ``dim`` change places: (scale, shift) ↔ (shift, scale)."""

    def __init__(self, foreign: str, ours: str, dim: int = 0):
        def swap(x: Tensor) -> Tensor:
            return torch.cat(_cutter(2, dim, None)(x)[::-1], dim)

        super().__init__(foreign, ours, swap, swap)


class Transform(Rule):
    """Any other rearrangement, e.g. the order of attention heads: give both directions.

    Args:
        foreign, ours: a template or several.
        forward: takes the foreign tensors as arguments, returns ours (one tensor, or one for each template).
        inverse: takes ours, returns the foreign ones. Both also run on meta tensors, so they may look at shapes
            but not at values.
    """


class Ignore(Rule):
    """A tensor of the file that the module computes by itself: position tables, position ids.

    Args:
        foreign: its template; a plain name where ``make`` is given.
        make: computes the table. The file must then hold it and hold the same numbers, and it is written
            back. Without ``make`` the tensor may be there or not, and is not written.
    """

    def __init__(self, foreign: str, make: Callable[[], Tensor] | None = None):
        super().__init__(foreign, (), lambda *_: (), lambda: make() if make else ())
        self.make = make


@dataclass(frozen=True)
class Step:
    """One rule applied to concrete names."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Function

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Targets by name; KitError naming the tensors whose shape the rule cannot take."""
        given = [tensors[name] for name in self.sources]
        try:
            out = self.function(*given)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.sources, given, strict=True))
            raise KitError(f"tensors cannot be rearranged as their format does: {shapes}") from error
        made = (out,) if isinstance(out, Tensor) else tuple(out)
        return dict(zip(self.targets, made, strict=True))


def plan(rules: Sequence[Rule], names: Iterable[str], *, inverse: bool = False) -> Iterator[Step]:
    """The steps that turn the tensors ``names`` of a file into ours, in the order of the names.

    Args:
        rules: of the format.
        names: of the tensors at hand.
        inverse: from ours to the file's; tables that the file holds and we do not come last.

    Sources that are not among ``names`` are listed in the steps all the same; what ``Ignore`` names has none.
    """
    find = _finder([(r, r.ours if inverse else r.foreign) for r in rules])
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        rule, values = find(name)
        sides = (rule.ours, rule.foreign) if inverse else (rule.foreign, rule.ours)
        sources, targets = (tuple(fill(t, values) for t in side) for side in sides)
        done.update(sources)
        yield Step(rule, sources, targets, rule.inverse if inverse else rule.forward)
    if inverse:
        yield from (
            Step(r, (), r.foreign, r.inverse) for r in rules if isinstance(r, Ignore) and r.make is not None
        )


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under our names; KitError names a tensor that a rule misses."""
    return _run(rules, tensors, inverse=False)


def to_foreign(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the file's names, with the tables it holds."""
    return _run(rules, tensors, inverse=True)


def _run(rules: Sequence[Rule], tensors: Mapping[str, Tensor], inverse: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for step in plan(rules, tensors, inverse=inverse):
        missing = [name for name in step.sources if name not in tensors]
        if missing:
            raise KitError(f"missing tensors {', '.join(missing)}, which make {', '.join(step.targets)}")
        out.update(step(tensors))
    return out


_KEEP = Rename("{rest}", "{rest}")  # what no rule names


def _finder(sides: list[tuple[Rule, tuple[str, ...]]]) -> Callable[[str], tuple[Rule, dict[str, str]]]:
    exact: dict[str, Rule] = {}
    patterns: list[tuple[re.Pattern[str], Rule]] = []
    for rule, templates in sides:
        for template in templates:
            if "{" in template:
                patterns.append((_pattern(template), rule))
            else:
                exact.setdefault(template, rule)

    def find(name: str) -> tuple[Rule, dict[str, str]]:
        if name in exact:
            return exact[name], {}
        for pattern, rule in patterns:
            match = pattern.fullmatch(name)
            if match:
                return rule, match.groupdict()
        return _KEEP, {"rest": name}

    return find


@cache
def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()
    out = ""
    for i, piece in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2 == 0:
            out += re.escape(piece)
        elif piece in seen:
            out += f"(?P={piece})"
        else:
            seen.add(piece)
            kind = ".+" if piece == "rest" else r"\d+" if len(piece) == 1 else r"[^.]+"
            out += f"(?P<{piece}>{kind})"
    return re.compile(out)


def matches(template: str, name: str) -> dict[str, str] | None:
    """What the placeholders of ``template`` stand for in ``name``, or None where it does not fit."""
    match = _pattern(template).fullmatch(name)
    return None if match is None else match.groupdict()


def fill(template: str, values: Mapping[str, str]) -> str:
    """The name that ``template`` stands for."""
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def _cutter(parts: int, dim: int, sizes: Sequence[int] | None) -> Callable[[Tensor], list[Tensor]]:
    def cut(x: Tensor) -> list[Tensor]:
        if sizes is None and x.shape[dim] % parts:
            raise ValueError("parts of unequal length")
        return list(x.split(list(sizes) if sizes else x.shape[dim] // parts, dim))

    return cut


def _reshaper(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def reshape(x: Tensor) -> Tensor:
        return x.reshape([x.shape[axis] if length == 0 else length for axis, length in enumerate(shape)])

    return reshape

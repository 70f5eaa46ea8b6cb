"""Scenes of one or two objects, their captions in English and Chinese, and which of them are held out.

A scene is what a caption says; positions and the ±3 % of size are drawn by the renderer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, CHINESE, COLORS, ENGLISH, RELATIONS, SHAPES, SIZES
from imagen_kit.errors import KitError

Language = Literal["en", "zh"]
Split = Literal["train", "held_out", "all"]

_SIZES, _COLORS, _BACKGROUNDS = tuple(SIZES), tuple(COLORS), tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Obj:
    """One object: words of ``SIZES``, ``COLORS`` and ``SHAPES``."""

    size: str
    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; ``relation`` says where the first stands from the second."""

    objects: tuple[Obj, ...]
    background: str
    relation: str | None = None


def _held_out_objects() -> frozenset[Obj]:
    # 13 of the 128 (size, colour, shape) triples, spread so that every word stays common in training:
    # one triple for each shape, a second one for the first five.
    triples = [Obj(_SIZES[i % 2], _COLORS[(3 * i + 1) % 8], SHAPES[i]) for i in range(8)]
    triples += [Obj(_SIZES[(i + 1) % 2], _COLORS[(3 * i + 5) % 8], SHAPES[i]) for i in range(5)]
    return frozenset(triples)


HELD_OUT = _held_out_objects()
"""Attribute combinations that no training picture and no training text contains."""


def is_held_out(scene: Scene) -> bool:
    """True when any object of the scene is a held-out combination of size, colour and shape."""
    return any(thing in HELD_OUT for thing in scene.objects)


def caption(scene: Scene, lang: Language = "en") -> str:
    """The caption of a scene in English or Chinese."""
    if lang == "en":
        things = [f"a {o.size} {o.color} {o.shape}" for o in scene.objects]
        return f" {scene.relation} ".join(things) + f" on a {scene.background} background"
    if lang != "zh":
        raise KitError(f"unknown caption language {lang!r}; choose from en, zh")
    zh = CHINESE
    things = [f"一个{zh[o.size]}{zh[o.color]}{zh[o.shape]}" for o in scene.objects]
    if scene.relation is None:
        return f"{zh[scene.background]}背景上的{things[0]}"
    return f"{zh[scene.background]}背景上，{things[0]}在{things[1]}的{zh[scene.relation]}"


def _any(words: Sequence[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _pattern(lang: Language) -> tuple[re.Pattern[str], re.Pattern[str]]:
    say = (
        (lambda words: _any(tuple(words)))
        if lang == "en"
        else (lambda words: _any([CHINESE[w] for w in words]))
    )
    size, color, shape = say(SIZES), say(COLORS), say(SHAPES)
    background, relation = say(BACKGROUNDS), say(RELATIONS)
    if lang == "en":
        thing, tail = f"a {size} {color} {shape}", f" on a {background} background"
        return re.compile(thing + tail), re.compile(f"{thing} {relation} {thing}{tail}")
    thing = f"一个{size}{color}{shape}"
    return (
        re.compile(f"{background}背景上的{thing}"),
        re.compile(f"{background}背景上，{thing}在{thing}的{relation}"),
    )


_EN_ONE, _EN_TWO = _pattern("en")
_ZH_ONE, _ZH_TWO = _pattern("zh")


def parse(text: str) -> Scene:
    """The scene a caption describes; the inverse of ``caption``.

    Raises:
        KitError: the text is not a caption of the pocket world.
    """
    text = text.strip()
    if m := _EN_ONE.fullmatch(text):
        *thing, background = m.groups()
        return Scene((Obj(*thing),), background)
    if m := _EN_TWO.fullmatch(text):
        w = m.groups()
        return Scene((Obj(*w[0:3]), Obj(*w[4:7])), w[7], w[3])
    if m := _ZH_ONE.fullmatch(text):
        background, *thing = (ENGLISH[word] for word in m.groups())
        return Scene((Obj(*thing),), background)
    if m := _ZH_TWO.fullmatch(text):
        w = tuple(ENGLISH[word] for word in m.groups())
        return Scene((Obj(*w[1:4]), Obj(*w[4:7])), w[0], w[7])
    raise KitError(
        f"{text!r} is no caption of the pocket world; write e.g. "
        "'a large red star above a small blue ring on a gray background'"
    )


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as integers, for rendering in one go.

    Attributes:
        size, color, shape: (b, 2) int64 indices into SIZES, COLORS, SHAPES; column 1 is unused for one object.
        relation: (b,) int64 index into RELATIONS, -1 for one object.
        background: (b,) int64 index into BACKGROUNDS.
    """

    size: Tensor
    color: Tensor
    shape: Tensor
    relation: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.relation)

    def __getitem__(self, index: Tensor | slice) -> SceneBatch:
        return SceneBatch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> SceneBatch:
        return SceneBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def of(scenes: Sequence[Scene]) -> SceneBatch:
        def column(words: Sequence[str], attribute: str) -> Tensor:
            rows = [[words.index(getattr(o, attribute)) for o in s.objects] for s in scenes]
            return torch.tensor([(row * 2)[:2] for row in rows]).reshape(-1, 2)

        return SceneBatch(
            size=column(_SIZES, "size"),
            color=column(_COLORS, "color"),
            shape=column(SHAPES, "shape"),
            relation=torch.tensor(
                [-1 if s.relation is None else RELATIONS.index(s.relation) for s in scenes]
            ),
            background=torch.tensor([_BACKGROUNDS.index(s.background) for s in scenes]),
        )

    def scenes(self) -> list[Scene]:
        out = []
        columns = (self.size, self.color, self.shape, self.relation, self.background)
        for size, color, shape, relation, background in zip(*(c.tolist() for c in columns), strict=True):
            count = 1 if relation < 0 else 2
            things = tuple(Obj(_SIZES[size[i]], _COLORS[color[i]], SHAPES[shape[i]]) for i in range(count))
            out.append(Scene(things, _BACKGROUNDS[background], None if relation < 0 else RELATIONS[relation]))
        return out


_HELD_OUT_TABLE = torch.zeros(len(_SIZES), len(_COLORS), len(SHAPES), dtype=torch.bool)
for _thing in HELD_OUT:
    _HELD_OUT_TABLE[_SIZES.index(_thing.size), _COLORS.index(_thing.color), SHAPES.index(_thing.shape)] = True


def sample_batch(
    n: int, generator: torch.Generator | None = None, split: Split = "train", pair_fraction: float = 0.75
) -> SceneBatch:
    """Draw n scenes, every word equally likely within the split; ``pair_fraction`` of them have two objects.

    ``held_out`` scenes contain at least one held-out object, ``train`` scenes none.
    """
    if split not in ("train", "held_out", "all"):
        raise KitError(f"unknown split {split!r}; choose from train, held_out, all")
    kept: list[SceneBatch] = []
    have = 0
    while have < n:
        many = max(64, 2 * (n - have)) * (6 if split == "held_out" else 1)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        pair = torch.rand(many, generator=generator) < pair_fraction
        batch = SceneBatch(
            size=draw(len(_SIZES), many, 2),
            color=draw(len(_COLORS), many, 2),
            shape=draw(len(SHAPES), many, 2),
            relation=torch.where(pair, draw(len(RELATIONS), many), -1),
            background=draw(len(_BACKGROUNDS), many),
        )
        held = _HELD_OUT_TABLE[batch.size, batch.color, batch.shape]
        held = held[:, 0] | (held[:, 1] & pair)
        same = (batch.color[:, 0] == batch.color[:, 1]) & (batch.shape[:, 0] == batch.shape[:, 1])
        good = ~(pair & same)
        if split != "all":
            good &= held if split == "held_out" else ~held
        kept.append(batch[good.nonzero().squeeze(1)])
        have += len(kept[-1])
    merged = SceneBatch(**{f.name: torch.cat([getattr(b, f.name) for b in kept]) for f in fields(SceneBatch)})
    return merged[:n]


def sample_scenes(
    n: int, generator: torch.Generator | None = None, split: Split = "train", pair_fraction: float = 0.75
) -> list[Scene]:
    """``sample_batch`` as ``Scene`` objects."""
    return sample_batch(n, generator, split, pair_fraction).scenes()

"""Prompts that are class labels: what a class-conditional model has in place of a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from imagen_kit import weights_path
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, nearest

IMAGENET = "imagenet"


class Labels:
    """Reads prompts as classes: ``labels(["207", "golden retriever"]) -> Cond`` with labels (b,) int64.

    Args:
        classes: how many there are; a prompt is a number from 0 to classes - 1, or a name.
        names: ``imagenet`` (the 1000 classes of ILSVRC 2012, through timm), or a text file with the name of
            a class a line, several of one class parted by commas; None for numbers alone.
        null: whether the network has one more class, the last, for "no class": what the empty prompt is.

    Raises:
        KitError: classes below 1, names that cannot be read or of another number; when called, a prompt that
            is no class, with the nearest name.
    """

    dim: int | None = None
    pooled_dim: int | None = None

    def __init__(self, classes: int, names: str | Path | None = None, null: bool = True):
        if classes < 1:
            raise KitError(f"labels: classes is {classes}; it must be at least 1")
        self.classes, self.null = classes, null
        lines = _names(names)
        if lines and len(lines) != classes:
            raise KitError(f"labels: {names} has {len(lines)} names for {classes} classes")
        self._numbers: dict[str, int] = {}
        for number, line in enumerate(lines):
            for name in line.split(","):  # a name that several classes have is the first's
                self._numbers.setdefault(name.strip().lower(), number)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Labels of the prompts, on the CPU."""
        return Cond(labels=torch.tensor([self.number(prompt) for prompt in prompts], dtype=torch.int64))

    def number(self, prompt: str) -> int:
        """The class of one prompt; ``classes`` for the empty one."""
        text = prompt.strip().lower()
        if not text:
            if self.null:
                return self.classes
            raise KitError("the empty prompt is no class of this model, which has none for 'no class'")
        if text.isdecimal() and int(text) < self.classes:
            return int(text)
        if text in self._numbers:
            return self._numbers[text]
        guess = nearest(text, self._numbers) if self._numbers else None
        hint = f"did you mean {guess!r}?" if guess else f"give a number from 0 to {self.classes - 1}"
        if self._numbers and not guess:
            hint += " or a name"
        raise KitError(f"prompt {prompt!r} is no class of this model; {hint}")


def _names(names: str | Path | None) -> list[str]:
    """One line a class."""
    if names is None:
        return []
    if names == IMAGENET:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(number) for number in range(info.num_classes())]
    path = weights_path.resolve(names)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"labels: names {names} cannot be read as UTF-8 text") from error

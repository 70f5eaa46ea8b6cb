"""Feature extractors for distances between sets of pictures; none of them downloads anything.

Written on the command line as ``judge``, ``pixels``, ``timm:resnet50@weights.safetensors`` or
``open_clip:ViT-B-32@weights.pt``; ``@random`` in place of a file makes seeded random weights.
Axes: b pictures, h w pixels, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagen_kit.data.pocket.vocabulary import BACKGROUNDS, COLORS, SHAPES, SIZES
from imagen_kit.errors import KitError, nearest, unknown
from imagen_kit.evaluation.judge import Judge, Reading

NONE = "none"
KINDS = ("judge", "pixels", "timm", "open_clip", NONE)
PIXELS = 8  # side of the thumbnails that ``pixels`` compares
MOST_OBJECTS = 2  # that a judge's description holds


@dataclass(frozen=True)
class Extractor:
    """Pictures to features.

    Attributes:
        name: as written on the command line; weights by their file's name.
        function: (b, 3, h, w) in [0, 1] → (b, d).
        batch_size: pictures at a time.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] → (b, d) float64 on the CPU."""
        return torch.cat([self.function(part).cpu().double() for part in images.split(self.batch_size)])


@dataclass(frozen=True)
class Choice:
    """An extractor that has been checked as far as can be without reading its weights.

    Attributes:
        kind: one of ``KINDS`` but ``none``.
        model: of timm or open_clip, else empty.
        weights: a file; None = seeded random ones (or none needed).
    """

    kind: str
    model: str = ""
    weights: Path | None = None

    def load(self, device: torch.device | str = "cpu") -> Extractor:
        """The extractor itself, computing on ``device``; KitError when the weights are of another model."""
        if not self.model:
            return Extractor(self.kind, judge_features if self.kind == "judge" else _pixels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = (_timm if self.kind == "timm" else _open_clip)(self.model, self.weights)
        name = f"{self.kind}:{self.model}@{self.weights.name if self.weights else 'random'}"
        return Extractor(name, network.eval().requires_grad_(False).to(device))


def parse(text: str) -> Choice | None:
    """The extractor called ``text``, see above; None for ``none``.

    Raises:
        KitError: unknown kind or model, weights not given or missing.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise KitError(unknown("feature extractor", kind, KINDS))
    if kind in ("judge", "pixels", NONE):
        if rest:
            raise KitError(f"feature extractor {kind!r} takes no model, but {text!r} gives {rest!r}")
        return None if kind == NONE else Choice(kind)
    model, _, weights = rest.partition("@")
    if not model or not weights:
        raise KitError(
            f"feature extractor {text!r} needs a model and weights: {kind}:MODEL@FILE (nothing is downloaded)"
        )
    _require_model(kind, model)
    if weights == "random":
        return Choice(kind, model)
    if not Path(weights).is_file():
        raise KitError(f"feature extractor {kind}:{model}: there is no weight file {weights}")
    return Choice(kind, model, Path(weights))


def _require_model(kind: str, model: str) -> None:
    if kind == "timm":
        import timm

        known = timm.list_models()
    else:
        import open_clip

        known = open_clip.list_models()
    if model not in known:
        guess = nearest(model, known)
        raise KitError(f"{kind} has no model {model!r}" + (f"; did you mean {guess!r}?" if guess else ""))


class _Network(nn.Module):
    """Resizes and normalises pictures as a network was trained to see them, and runs it."""

    mean: Tensor
    std: Tensor
    run: Callable[[Tensor], Tensor]

    def __init__(self, network: Callable[[Tensor], Tensor], owner: nn.Module, data: dict[str, Any]):
        super().__init__()
        self.owner, self.side = owner, data["side"]  # the owner's weights move with this module
        self.run = network
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean)
        images = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True)
        return self.run((images.clamp(0, 1) - self.mean) / self.std).flatten(1)


def _timm(model: str, weights: Path | None) -> nn.Module:
    import timm

    network = timm.create_model(model, pretrained=False)
    if weights is not None:
        try:
            timm.models.load_checkpoint(network, str(weights), strict=True)
        except Exception as error:  # each format of file fails in a way of its own
            raise _misfit(weights, model, error) from error
    network.reset_classifier(0)  # type: ignore[operator] # what is left ends in the pooled features
    data = timm.data.resolve_model_data_config(network)
    return _Network(
        network, network, {"mean": data["mean"], "std": data["std"], "side": data["input_size"][-1]}
    )


def _open_clip(model: str, weights: Path | None) -> nn.Module:
    import open_clip

    try:
        network = open_clip.create_model(model, pretrained=weights and str(weights), pretrained_hf=False)
    except Exception as error:
        raise _misfit(weights, model, error) from error
    visual = network.visual
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    mean = visual.image_mean or open_clip.OPENAI_DATASET_MEAN
    std = visual.image_std or open_clip.OPENAI_DATASET_STD
    return _Network(network.encode_image, visual, {"mean": mean, "std": std, "side": side})


def _misfit(weights: Path | None, model: str, error: Exception) -> KitError:
    return KitError(f"{weights} is not a weight file of {model}: {' '.join(str(error).split())[:200]}")


def _pixels(images: Tensor) -> Tensor:
    """Pictures averaged down to 8×8 pixels."""
    return F.interpolate(images.float(), size=(PIXELS, PIXELS), mode="area").flatten(1)


def judge_features(images: Tensor) -> Tensor:
    """What the pocket judge reads in each picture, as 50 numbers: one per word, count and place."""
    return torch.tensor([_describe(reading) for reading in Judge().read(images)])


def _describe(reading: Reading) -> list[float]:
    """Words as 0 or 1, then place and size, of the background and the first two objects by place."""
    out = _one_hot(reading.background, BACKGROUNDS) + _one_hot(reading.count, range(-1, 4))
    objects = sorted(reading.objects, key=lambda seen: (round(seen.y, 1), seen.x))[:MOST_OBJECTS]
    for seen in objects:
        out += [*_one_hot(seen.color, COLORS), *_one_hot(seen.shape, SHAPES), *_one_hot(seen.size, SIZES)]
        out += [seen.x, seen.y, seen.side]
    width = len(COLORS) + len(SHAPES) + len(SIZES) + 3
    return out + [0.0] * (width * (MOST_OBJECTS - len(objects)))


def _one_hot(value: Any, choices: Any) -> list[float]:
    return [float(value == choice) for choice in choices]

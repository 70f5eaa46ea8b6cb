"""Whole recipes to measure: weights random or real, text given, one stage or several.

Axes: b pictures, n text tokens, d token width, p pooled width, c h w latents.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from imagen_kit import recipe, samplers
from imagen_kit.bench import small
from imagen_kit.bench.peers.pipelines import Given
from imagen_kit.bench.work import randomised
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.hollow import hollow_parameters
from imagen_kit.pipeline import Pipeline, derive_seed
from imagen_kit.recipe import Recipe, source
from imagen_kit.recipe.running import run_as_told, with_dtype
from imagen_kit.samplers import step_lists
from imagen_kit.stage import Stage, start
from imagen_kit.text_encoders.base import Row, TextEncoder

WEIGHTS = ("random", "real")
TEXTS = ("given", "own")
USUAL = 40  # tokens of a prompt, where it is not padded


class GivenText(TextEncoder):
    """Random embeddings in the place of an encoder's, the same for the same prompt, of the encoder's shapes.

    Args:
        like: the encoder, which may be hollow.
    """

    def __init__(self, like: Any):
        super().__init__("given", dim=like.dim, pooled_dim=like.pooled_dim, max_length=like.max_length)
        self.padded = _padded(like)

    def _encode(self, prompts: list[str]) -> list[Row]:
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> Row:
        draw = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        length = self.max_length if self.padded else min(USUAL, self.max_length) if prompt else 1
        tokens = torch.randn(length, self.dim, generator=draw).to(self.device)
        if self.pooled_dim is None:
            return Row(tokens)
        return Row(tokens, torch.randn(self.pooled_dim, generator=draw).to(self.device))


def _padded(encoder: Any) -> bool:
    """Whether its prompts always have their full length."""
    inner = list(getattr(encoder, "parts", []))
    if inner:
        return all(map(_padded, inner))
    return getattr(encoder, "padding", "masked") != "masked"


@dataclass(frozen=True)
class RandomRecipe(Recipe):
    """A recipe whose weights are random, also where layers start at zero.

    Attributes:
        device: where they are drawn.
        text: ``given``: in place of the text encoder's work; ``own``: the text encoder that the recipe names.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text: str = "given"

    def build_text_encoder(self, index: int | None = None) -> Any:
        """The text encoder, or what stands in for it; class labels are read as ever."""
        if self.spec.labels is not None or self.text == "own":
            return super().build_text_encoder(index)
        return GivenText(self.hollow_text_encoder(index))

    def build_stage_denoiser(
        self, index: int, text_encoder: Any = None, weights: bool = True, network: str | None = None
    ) -> nn.Module:
        """The denoiser with random weights, drawn on the device."""
        with hollow_parameters():
            module = super().build_stage_denoiser(index, text_encoder, False, network)
        return randomised(module, self.device, seed=index)

    def build_codec(self, index: int, weights: bool = True) -> Any:
        with hollow_parameters():
            codec = super().build_codec(index, False)
        return randomised(codec, self.device, seed=100 + index) if isinstance(codec, nn.Module) else codec


@dataclass(frozen=True)
class Asked:
    """Which recipe, and what is changed in it.

    Attributes:
        name: a shipped recipe's, or a file.
        size: full, small or tiny.
        changes: further ones, as ``--set`` takes them.
        stages: how many of its stages; None for all, of small and tiny variants for the first.
        weights: random or real.
        performance: of every stage, see ``imagen_kit.performance.Performance``.
        text: with random weights ``given``, or read by the recipe's ``own`` encoder; with real ones by that.

    Raises:
        KitError: a value that there is not.
    """

    name: str
    size: str = "full"
    changes: Sequence[str] = ()
    stages: int | None = None
    weights: str = "random"
    performance: Mapping[str, Any] | None = None
    text: str = "given"

    def load(self, device: torch.device) -> Recipe:
        """The recipe, checked; with random weights a ``RandomRecipe``."""
        if self.weights not in WEIGHTS:
            raise KitError(unknown("weights of a recipe", self.weights, WEIGHTS))
        if self.text not in TEXTS:
            raise KitError(unknown("text of a recipe", self.text, TEXTS))
        changes = [*small.overrides(self.name, self.size), *self.changes]
        if self.performance:
            told = yaml.safe_dump(dict(self.performance), default_flow_style=True).strip()
            count = len(source.read(source.find(self.name)).get("stages", []))
            changes += [f"stages.{i}.performance={told}" for i in range(count)]
        found = recipe.load(self.name, changes)
        kept = self.stages
        if kept is None and self.size != small.FULL:
            kept = 1  # what the others have a pipeline for
        if kept is not None:
            if not 1 <= kept <= len(found.stages):
                raise KitError(
                    f"recipe {self.name!r} has {len(found.stages)} stages; stages cannot be {kept}"
                )
            found = replace(found, spec=found.spec.model_copy(update={"stages": found.stages[:kept]}))
        if self.weights == "real":
            return found
        return RandomRecipe(found.spec, found.source, found.folder, found.train, device, self.text)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn.

    Attributes:
        sampler: of the first stage, a name of ours or another project's; None for the recipe's.
        steps: of every stage; None for the recipe's.
        guidance: scale in the first stage; None for the recipe's.
        batch: b.
        dtype: of networks and decoders.
    """

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int = 1
    dtype: str = "fp32"


class System:
    """A built recipe and how it is asked to draw.

    Args:
        asked: which.
        settings: how.
        device: where.
    """

    def __init__(self, asked: Asked, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        loaded = self.recipe = asked.load(device)
        real = asked.weights == "real"
        if loaded.spec.offload != "none" and not real:
            raise KitError("a recipe that is offloaded reads its weights again and again: give weights: real")
        if loaded.spec.offload != "none":
            self.pipeline = loaded.build(device, settings.dtype)
        else:
            encoder = loaded.build_text_encoder()
            stages = [loaded.build_stage(i, encoder, real) for i in range(len(loaded.stages))]
            self.pipeline = Pipeline(encoder, stages, loaded.spec.unconditional).to(device)
        self.pipeline.stages = [self._stage(stage, not i) for i, stage in enumerate(self.pipeline.stages)]
        self.labels = loaded.spec.labels is not None

    def _stage(self, stage: Stage, first: bool) -> Stage:
        told = self.settings
        if told.sampler is not None and first:
            stage = replace(stage, sampler=samplers.create(told.sampler))
        if told.steps is None:
            return stage
        if stage.sampler.spacing in step_lists.LENGTHS:  # a published list of times, of one length
            stage = replace(stage, sampler=replace(stage.sampler, spacing="linspace"))
        return replace(stage, steps=told.steps)

    def run_as_told(self) -> None:
        """Bring networks and decoders into the precision and form that is asked for; once, before drawing."""
        if self.offloaded:
            return  # done as it was built
        self.pipeline.stages = [self._whole(stage) for stage in self.pipeline.stages]
        self.pipeline = run_as_told(self.pipeline, self.recipe, self.device, self.settings.dtype)

    def _whole(self, stage: Stage) -> Stage:
        """The stage with its codec in its network's precision, where nothing else is said."""
        told = with_dtype(stage.performance, self.settings.dtype)
        return replace(stage, performance=replace(told, codec_dtype=told.codec_dtype or told.dtype))

    @property
    def offloaded(self) -> bool:
        """Whether parts are in memory only while they work."""
        return self.recipe.spec.offload != "none"

    @property
    def prompts(self) -> list[str]:
        """One a picture: texts, or class numbers."""
        return [str(207 + i) if self.labels else f"prompt {i}" for i in range(self.settings.batch)]

    @property
    def seeds(self) -> list[int]:
        """One a picture."""
        return list(range(self.settings.batch))

    def draw(self) -> Tensor:
        """(b, 3, s, s) in [0, 1]."""
        told = self.settings
        return self.pipeline(self.prompts, seed=self.seeds, guidance=told.guidance).tensor

    @property
    def stages(self) -> list[Stage]:
        """With this call's guidance."""
        return self.pipeline._settings(None, None, self.settings.guidance, [])

    @property
    def evaluations(self) -> int:
        """Network calls of one run."""
        return sum(calls for _, calls in map(start, self.stages))

    @property
    def steps(self) -> int:
        """Sampler steps of one run."""
        return sum(len(s.sampler.points(s.schedule, s.steps)) - 1 for s in self.stages)

    @property
    def modules(self) -> list[nn.Module]:
        """Networks and codecs."""
        codecs = [s.codec for s in self.pipeline.stages if isinstance(s.codec, nn.Module)]
        return [*(module for s in self.pipeline.stages for module in s.modules), *codecs]

    def given(self, dtype: torch.dtype) -> Given:
        """What the first stage begins with, for another's pipeline: text padded to its full length."""
        stage, batch = self.stages[0], self.settings.batch
        side = stage.size // stage.codec.factor
        shape = (stage.codec.channels, side, side)

        def fresh() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(derive_seed(seed, 0)) for seed in self.seeds]

        def later() -> list[torch.Generator]:
            generators = fresh()
            for generator in generators:
                torch.randn(shape, generator=generator)
            return generators

        noise = torch.stack([torch.randn(shape, generator=generator) for generator in fresh()]).to(
            self.device
        )
        owner = torch.arange(batch, device=self.device)
        conds = self.pipeline._encode(self.prompts, {"uncond": [""] * batch}, self.stages, owner)[0]
        length = getattr(self.pipeline.text_encoder, "max_length", 0)
        cond, uncond = (
            None if found is None else _padded_to(found, length).to(dtype=dtype)
            for found in (conds["cond"], conds.get("uncond"))
        )
        assert cond is not None
        steps = len(stage.sampler.points(stage.schedule, stage.steps)) - 1
        return Given(cond, uncond, noise.to(dtype), later, steps)


def _padded_to(cond: Cond, length: int) -> Cond:
    """Text with masked zeros up to a length."""
    if cond.tokens is None or cond.mask is None:
        return cond
    missing = length - cond.tokens.shape[1]
    tokens = nn.functional.pad(cond.tokens, (0, 0, 0, missing))
    return replace(cond, tokens=tokens, mask=nn.functional.pad(cond.mask, (0, missing)))

"""A recipe: a YAML file that names parts, checked as a whole and then built into a pipeline.

``load("pocket-imagen")`` reads and checks; every fault of the file is reported at once, each with its path,
the rule and the nearest valid name, before any weight is read. ``load(...).build()`` makes the parts and
wires their dimensions: encoder width and codec channels to denoiser, schedule time to time embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_kit.errors import Fault, KitError, RecipeError
from imagen_kit.recipe import check, source, validate
from imagen_kit.recipe.source import names
from imagen_kit.recipe.spec import Part, RecipeSpec, StageSpec, normalise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagen_kit.pipeline import Pipeline, Stage

__all__ = ["Part", "Recipe", "RecipeSpec", "StageSpec", "load", "names"]


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been checked.

    Attributes:
        spec: its content.
        source: the name or path it was loaded by.
        folder: where its relative file names start.
        train: its ``train`` section, validated (``imagen_kit.training.config.TrainConfig``), or None.
    """

    spec: RecipeSpec
    source: str
    folder: Path
    train: Any = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def stages(self) -> list[StageSpec]:
        return self.spec.stages

    def build(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, weights: bool = True
    ) -> Pipeline:
        """The pipeline, its weights loaded and each stage run as its ``performance`` says.

        Args:
            device: where its networks go.
            dtype: of the denoisers of stages that do not say it themselves: a torch dtype, its short name, or
                ``auto``; float32 by default. The sampler's state stays float32.
            weights: load the stages' weight files; False leaves every denoiser at its initial values.

        Raises:
            KitError: a weight file that is missing, damaged or does not fit, before anything is computed; a
                performance that this machine does not offer.
        """
        from imagen_kit.pipeline import Pipeline
        from imagen_kit.recipe.running import run_as_told

        if weights:
            self._require_weights()
        if self.spec.offload != "none":
            from imagen_kit.recipe.offloading import build_offloaded

            return build_offloaded(self, device, dtype, weights)
        encoder = self.build_text_encoder()
        stages = [self.build_stage(index, encoder, weights) for index in range(len(self.stages))]
        return run_as_told(Pipeline(encoder, stages, self.spec.unconditional), self, device, dtype)

    def build_text_encoder(self, index: int | None = None) -> Any:
        """The frozen text encoder with its weights; of class labels, what reads prompts as labels.

        Args:
            index: of a stage that may have a text encoder of its own; None for the recipe's.
        """
        part, labels = self._text_part(index), self.spec.labels
        if labels is not None:
            from imagen_kit.labels import Labels

            return Labels(**{**labels.model_dump(), "names": self._names(labels.names)})
        assert part is not None
        return check.registries()["text_encoder"].create(
            part.name, **source.localised(part.options, self.folder)
        )

    def hollow_text_encoder(self, index: int | None = None) -> Any:
        """The text encoder without memory for its weights, which need not be there where its size is given.

        Args:
            index: as in ``build_text_encoder``.

        Raises:
            KitError: weights that are not there, of an encoder whose ``size`` is not given.
        """
        from imagen_kit.hollow import hollow

        part = self._text_part(index)
        if part is None:
            return self.build_text_encoder()
        registry = check.registries()["text_encoder"]
        with hollow():
            try:
                return registry.create(part.name, **source.localised(_weightless(part.options), self.folder))
            except (RuntimeError, KitError):  # loaders of existing weights refuse the meta device
                pass
        return self.build_text_encoder(index)

    def _text_part(self, index: int | None) -> Part | None:
        own = None if index is None else self.stages[index].text_encoder
        return own or self.spec.text_encoder

    def build_stage_denoiser(
        self, index: int, text_encoder: Any = None, weights: bool = True, network: str | None = None
    ) -> nn.Module:
        """The denoiser of stage ``index``, in float32 on the CPU.

        Args:
            index: of the stage.
            text_encoder: what it is wired to; built when not given, since only then its widths are known.
            weights: load the stage's weight file; without one, or with False, initial values are drawn from
                torch's global generator.
            network: one of the stage's further networks instead.
        """
        stage = self.stages[index]
        chosen = stage if network is None else stage.networks[network]
        encoder = self.build_text_encoder(index) if text_encoder is None else text_encoder
        path = f"stages.{index}" + ("" if network is None else f".networks.{network}")
        options = self.denoiser_options(index, encoder, network)
        registry = check.registries()["denoiser"]
        if weights and chosen.weights != "random":
            from imagen_kit.recipe.loading import load_network

            try:
                return load_network(
                    "denoiser", registry, chosen.denoiser.name, options, self.weight_file(index, network)
                )
            except KitError as error:
                raise RecipeError(self.source, [Fault(f"{path}.weights", str(error))]) from error
        return registry.create(chosen.denoiser.name, **options)

    def denoiser_options(self, index: int, encoder: Any, network: str | None = None) -> dict[str, Any]:
        """The arguments of a stage's denoiser (or further network), wired to what reads the prompts."""
        stage = self.stages[index]
        part = (stage if network is None else stage.networks[network]).denoiser
        path = f"stages.{index}" + ("" if network is None else f".networks.{network}")
        if self.spec.labels is not None:
            text = {"num_classes": self.spec.labels.classes}
        else:
            text = {"context_dim": encoder.dim, "pooled_dim": encoder.pooled_dim}
        self._require_agreement(f"{path}.denoiser", part, text)
        dimensions = {**check.dimensions(stage, index), **text}
        return check.wired(check.registries()["denoiser"], part.name, part.options, dimensions)

    def build_stage_parts(self, index: int, weights: bool = False, hollow: bool = False) -> dict[str, Any]:
        """Schedule, codec, sampler, guidance and ``low_res`` of stage ``index``.

        Args:
            index: of the stage.
            weights: load the codec's.
            hollow: make the codec without memory for its weights.
        """
        from imagen_kit.hollow import hollow as without_memory

        stage, kinds = self.stages[index], check.registries()
        parts = {key: getattr(stage, key) for key in ("schedule", "sampler")}
        built = {key: kinds[key].create(part.name, **part.options) for key, part in parts.items()}
        with without_memory() if hollow else contextlib.nullcontext():
            built["codec"] = self.build_codec(index, weights)
        built["guidance"] = tuple(kinds["guidance"].create(p.name, **p.options) for p in stage.guidance)
        built["low_res"] = check.low_res(stage)
        return built

    def weight_file(self, index: int, network: str | None = None) -> Path:
        """Where the weights of stage ``index`` (or of a further network of it) lie.

        That is beside the recipe, else from the working folder, else on the hub.

        Raises:
            KitError: there is no such file, with the nearest one.
        """
        from imagen_kit.recipe.loading import locate

        stage = self.stages[index]
        return locate((stage if network is None else stage.networks[network]).weights, self.folder)

    def build_codec(self, index: int, weights: bool = True) -> Any:
        """The codec of stage ``index``, its weights loaded, or with its initial values."""
        part, registry = self.stages[index].codec, check.registries()["codec"]
        if not weights or part.weights in (None, "random"):
            return registry.create(part.name, **part.options)
        from imagen_kit.recipe.loading import load_network, locate

        try:
            return load_network(
                "codec", registry, part.name, part.options, locate(str(part.weights), self.folder)
            )
        except KitError as error:
            raise RecipeError(self.source, [Fault(f"stages.{index}.codec.weights", str(error))]) from error

    def _names(self, names: str | None) -> str | Path | None:
        beside = self.folder / (names or "")
        return beside if names and beside.is_file() else names

    def build_stage(self, index: int, encoder: Any, weights: bool = True, own: Any = None) -> Stage:
        """Stage ``index``, its weights loaded, in float32 on the CPU.

        Args:
            index: of the stage.
            encoder: the recipe's text encoder, which it is wired to.
            weights: load the weight files.
            own: the stage's own text encoder, which is built where the recipe has one and it is not given.
        """
        from imagen_kit.performance.options import Performance
        from imagen_kit.pipeline import Stage

        stage = self.stages[index]
        if own is None and stage.text_encoder is not None:
            own = self.build_text_encoder(index)
        encoder = encoder if own is None else own
        with _seeded(index):  # a stage with random weights is the same network every time
            denoiser = self.build_stage_denoiser(index, encoder, weights)
            networks = {
                name: self.build_stage_denoiser(index, encoder, weights, network=name)
                for name in stage.networks
            }
        return Stage(
            name=stage.name,
            denoiser=denoiser,
            prediction=stage.prediction,
            size=stage.size,
            steps=stage.sampler.steps,
            low_res_level=stage.low_res_level,
            text_encoder=own,
            sigma_data=stage.sigma_data,
            networks=networks,
            execution=stage.execution,
            told=stage.told.model_dump(exclude_none=True),
            performance=Performance(**stage.performance.model_dump()),
            cache=self._cache(index),
            **self.build_stage_parts(index, weights),
        )

    def _cache(self, index: int) -> Any:
        part = self.stages[index].cache
        return None if part is None else check.registries()["cache"].create(part.name, **part.options)

    def _require_weights(self) -> None:
        """All missing or damaged weight files at once, before the first is loaded."""
        from imagen_kit.recipe.loading import inspect_file, locate

        faults = []
        for index, stage in enumerate(self.stages):
            named = [("", stage.weights, "denoiser"), (".codec", stage.codec.weights, "codec")]
            named += [(f".networks.{key}", part.weights, "denoiser") for key, part in stage.networks.items()]
            for key, weights, kind in named:
                if weights not in (None, "random"):
                    try:
                        inspect_file(locate(str(weights), self.folder), kind)
                    except KitError as error:
                        faults.append(Fault(f"stages.{index}{key}.weights", str(error)))
        if faults:
            raise RecipeError(self.source, faults)

    def _require_agreement(self, path: str, part: Part, dimensions: dict[str, Any]) -> None:
        """A dimension typed in the recipe although it is wired must at least be the right one."""
        typed = part.options
        whose = "the text encoder's" if self.spec.labels is None else "the number of labels"
        faults = [
            Fault(
                f"{path}.{key}",
                f"is {typed[key]}, but {whose} is {value}; leave it out, it is wired",
            )
            for key, value in dimensions.items()
            if typed.get(key) not in (None, value)
        ]
        if faults:
            raise RecipeError(self.source, faults)


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file anywhere.
        overrides: ``"stages.base.sampler.steps=8"`` and the like, applied before checking.

    Raises:
        RecipeError: every fault found.
        KitError: no such recipe, not YAML, or a malformed override.
    """
    path = source.find(name_or_path)
    data = normalise(source.override(source.read(path), overrides))
    if faults := validate.faults(data):
        raise RecipeError(str(name_or_path), faults)
    return Recipe(
        RecipeSpec.model_validate(data), str(name_or_path), path.parent, validate.train_config(data)
    )


def _weightless(options: Any) -> Any:
    """A text encoder's options with random weights wherever its size is given, also of nested encoders."""
    if isinstance(options, list):
        return [_weightless(item) for item in options]
    if not isinstance(options, dict):
        return options
    out = {key: _weightless(value) if key == "encoders" else value for key, value in options.items()}
    # Without its weights an encoder has no tokenizer of its own either; none is needed to count.
    return {**out, "weights": "random"} if out.get("size") is not None else out


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator at ``seed`` inside, and as it was afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

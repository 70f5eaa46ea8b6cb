"""diffusers' own pipelines for one stage of a recipe: the same weights, sampler, guidance, noise and embeddings.

    paint = painter(stage, model, codec, given)     # a function of no argument: pictures (b, 3, h, w) in [0, 1]

Axes: b pictures, c h w latents, n text tokens, d token width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers import dit_loop, library
from imagen_kit.bench.peers.scheduling import scheduler_for
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.joint import to_patches
from imagen_kit.errors import KitError
from imagen_kit.guidance.cfg import CFG
from imagen_kit.guidance.dynamic_threshold import DynamicThreshold
from imagen_kit.stage import Stage

LONGEST = 512  # tokens of a prompt that is not cut
EMBEDDED = ("prompt_embeds", "prompt_attention_mask")  # how arguments end that are embeddings


@dataclass(frozen=True)
class Given:
    """What a stage begins with.

    Attributes:
        cond, uncond: conditionings (b rows), text padded to its full length; ``uncond`` None without guidance.
        noise: (b, c, h, w) of spread 1, where sampling starts.
        generators: () → sources of the further noise, one a picture, as ours stand after that draw.
        steps: of the sampler.
    """

    cond: Cond
    uncond: Cond | None
    noise: Tensor
    generators: Callable[[], list[torch.Generator]]
    steps: int

    @property
    def batch(self) -> int:
        """b."""
        return len(self.noise)


class Words(Protocol):
    """One of our tokenizers."""

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]: ...


@dataclass(frozen=True)
class Reader:
    """Who reads prompts in every call, as these pipelines do where they are given no embeddings.

    Attributes:
        words: makes token ids of prompts.
        network: transformers' encoder.
        prompts: () → the prompts of the next call.
    """

    words: Words
    network: nn.Module
    prompts: Callable[[], list[str]]

    def tokenizer(self, prompts: str | Sequence[str], **told: Any) -> Any:
        """What a tokenizer of transformers answers: ``input_ids`` and ``attention_mask``, (b, n) int64.

        Args:
            prompts: b of them.
            told: ``padding`` (``max_length``, or else to the longest) and ``max_length`` are heeded.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = self.words(texts, told.get("max_length") or LONGEST)
        whole = told.get("padding") == "max_length"
        width = told["max_length"] if whole else max(map(len, rows))
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


@dataclass(frozen=True)
class Kind:
    """One of diffusers' pipelines.

    Attributes:
        name: its class.
        slot: the argument that its network is.
        absent: arguments that are given as None, since embeddings come ready-made.
        arguments: (stage, what is given) → how it is called.
        more: further arguments of the constructor.
        codec: whether it has an autoencoder.
        draws: whether it draws the first noise itself, having no argument for it.
        reads: whether it reads prompts by a T5 encoder alone.
    """

    name: str
    slot: str
    absent: tuple[str, ...]
    arguments: Callable[[Stage, Given], dict[str, Any]]
    more: Mapping[str, Any] | None = None
    codec: bool = True
    draws: bool = False
    reads: bool = False


def painter(
    stage: Stage,
    model: nn.Module,
    codec: nn.Module | None,
    given: Given,
    compiled: bool = False,
    reader: Reader | None = None,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], str]:
    """(as it is to be run, operation by operation, what it is in words).

    Args:
        stage: of ours.
        model: the twin of its network, in the dtype it is to be run in.
        codec: the twin of its autoencoder, likewise.
        given: what both begin with.
        compiled: run the network through torch.compile, as diffusers' documentation tells.
        reader: encodes the prompts of every call, in place of the embeddings given.

    Raises:
        KitError: no pipeline for such a network, another guidance or sampler than it has, or one that reads no
            prompts by T5 alone.
    """
    kind = _kind(model)
    if reader is not None and not kind.reads:
        able = ", ".join(kind.name for kind in KINDS.values() if kind.reads)
        raise KitError(
            f"a prompt is read here by pipelines with T5 alone ({able}), and this is a {kind.name}"
        )
    run_by = torch.compile(model) if compiled else model
    if kind.name == "DiTPipeline" and dit_loop.needed(stage):
        paint, note = dit_loop.painter(stage, model, codec, given, run_by)
    else:
        paint, note = _by_pipeline(kind, stage, model, codec, given, run_by, reader)
    words = [note, str(next(model.parameters()).dtype).removeprefix("torch.")]
    return (
        paint,
        lambda: paint(model),
        ", ".join([*words, *(["network by torch.compile"] if compiled else [])]),
    )


def _by_pipeline(
    kind: Kind,
    stage: Stage,
    model: nn.Module,
    codec: nn.Module | None,
    given: Given,
    run_by: Any,
    reader: Reader | None,
) -> tuple[Callable[..., Tensor], str]:
    """(a function that draws, by the network it may be handed; what it is in words)."""
    scale, scheduler = _guidance(stage, kind), scheduler_for(stage, _threshold(stage))
    parts = {kind.slot: model, "scheduler": scheduler, **dict.fromkeys(kind.absent), **(kind.more or {})}
    if kind.codec:
        parts["vae"] = codec
    if reader is not None:
        parts |= {"tokenizer": reader.tokenizer, "text_encoder": reader.network}
    pipe = getattr(library("diffusers"), kind.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": given.steps,
        "output_type": "pt",
        "guidance_scale": scale,
        **kind.arguments(stage, given),
    }
    if reader is not None:
        arguments = {key: value for key, value in arguments.items() if not key.endswith(EMBEDDED)}
        arguments["negative_prompt"] = [""] * given.batch
    noise = given.noise.to(next(model.parameters()).dtype)

    @torch.no_grad()
    def paint(through: Any = run_by) -> Tensor:
        setattr(pipe, kind.slot, through)
        with _noise_given(pipe, noise if kind.draws else None):
            texts = {} if reader is None else {"prompt": reader.prompts()}
            found = pipe(generator=given.generators(), **texts, **arguments).images
        picture = found if isinstance(found, Tensor) else torch.from_numpy(found).permute(0, 3, 1, 2)
        if kind.name == "IFPipeline":
            picture = (picture / 2 + 0.5).clamp(0, 1)
        return picture.float()

    told = "" if reader is None else ", encoding every prompt and the empty one in each call"
    return paint, f"{kind.name}, {type(scheduler).__name__}{told}"


class _noise_given:
    """Makes a pipeline that draws its first noise itself take what is given; others are left alone."""

    def __init__(self, pipe: Any, noise: Tensor | None):
        self._module: Any = sys.modules[type(pipe).__module__]
        self._noise = noise

    def __enter__(self) -> None:
        if self._noise is not None:
            self._own, noise = self._module.randn_tensor, self._noise
            self._module.randn_tensor = lambda *_, **__: noise.clone()

    def __exit__(self, *_: object) -> None:
        if self._noise is not None:
            self._module.randn_tensor = self._own


def _kind(model: Any) -> Kind:
    name = type(model).__name__
    if name == "UNet2DConditionModel":
        added = model.config.addition_embed_type
        name += {None: "", "text_time": " told sizes", "text": " pooling its text"}[added]
        if model.config.class_embed_type is not None or model.config.num_class_embeds is not None:
            raise KitError(
                "diffusers' pipeline of a super-resolution stage starts from a picture; give stages: 1"
            )
    if name not in KINDS:
        raise KitError(f"there is no way here to sample a {name} by diffusers; only {', '.join(KINDS)}")
    return KINDS[name]


def _guidance(stage: Stage, kind: Kind) -> float:
    """The scale; KitError for guidance that the pipeline has not."""
    scale = 1.0
    for strategy in stage.guidance:
        if isinstance(strategy, CFG) and strategy.channels is None:
            scale = strategy.scale
        elif not (isinstance(strategy, DynamicThreshold) and kind.name == "IFPipeline"):
            raise KitError(
                f"{kind.name} does not guide like {type(strategy).__name__} as this stage has it; "
                "set stages.0.guidance=[{name: cfg, scale: ...}]"
            )
    return scale


def _threshold(stage: Stage) -> DynamicThreshold | None:
    return next((s for s in stage.guidance if isinstance(s, DynamicThreshold)), None)


def _text(given: Given, pooled: bool = False) -> dict[str, Any]:
    found = {"prompt_embeds": given.cond.tokens}
    if given.uncond is not None:
        found["negative_prompt_embeds"] = given.uncond.tokens
    if pooled:
        found["pooled_prompt_embeds"] = given.cond.pooled
        if given.uncond is not None:
            found["negative_pooled_prompt_embeds"] = given.uncond.pooled
    return found


def _sides(stage: Stage) -> dict[str, Any]:
    return {"height": stage.size, "width": stage.size}


def _sd(stage: Stage, given: Given) -> dict[str, Any]:
    return {**_text(given), **_sides(stage), "latents": given.noise}


def _sdxl(stage: Stage, given: Given) -> dict[str, Any]:
    sizes = [int(number) for number in stage.told["size"]]
    told = {"original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}
    found = {**_text(given, pooled=True), **_sides(stage), "latents": given.noise}
    return {**found, **{key: tuple(value) for key, value in told.items()}}


def _pixart(stage: Stage, given: Given) -> dict[str, Any]:
    found = {
        **_text(given),
        **_sides(stage),
        "latents": given.noise,
        "prompt_attention_mask": given.cond.mask,
    }
    if given.uncond is not None:
        found["negative_prompt_attention_mask"] = given.uncond.mask
    return {**found, "negative_prompt": None, "use_resolution_binning": False, "clean_caption": False}


def _dit(stage: Stage, given: Given) -> dict[str, Any]:
    assert given.cond.labels is not None
    return {"class_labels": given.cond.labels.tolist(), "output_type": "np"}


def _if(stage: Stage, given: Given) -> dict[str, Any]:
    return {**_text(given), **_sides(stage), "clean_caption": False}


def _sd3(stage: Stage, given: Given) -> dict[str, Any]:
    return {**_text(given, pooled=True), **_sides(stage), "latents": given.noise}


def _flux(stage: Stage, given: Given) -> dict[str, Any]:
    text = {"prompt_embeds": given.cond.tokens, "pooled_prompt_embeds": given.cond.pooled}
    scale = float(stage.told.get("guidance", 1.0))
    return {**text, **_sides(stage), "latents": to_patches(given.noise, 2), "guidance_scale": scale}


_WORDS = ("text_encoder", "tokenizer")
_SAFETY: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
#: diffusers' model, with what it is told besides → its pipeline.
KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": Kind("StableDiffusionPipeline", "unet", _WORDS, _sd, _SAFETY),
    "UNet2DConditionModel told sizes": Kind(
        "StableDiffusionXLPipeline",
        "unet",
        (*_WORDS, "text_encoder_2", "tokenizer_2"),
        _sdxl,
        {"add_watermarker": False},
    ),
    "UNet2DConditionModel pooling its text": Kind(
        "IFPipeline",
        "unet",
        _WORDS,
        _if,
        {**_SAFETY, "watermarker": None},
        codec=False,
        draws=True,
        reads=True,
    ),
    "PixArtTransformer2DModel": Kind("PixArtAlphaPipeline", "transformer", _WORDS, _pixart, reads=True),
    "DiTTransformer2DModel": Kind("DiTPipeline", "transformer", (), _dit, draws=True),
    "SD3Transformer2DModel": Kind(
        "StableDiffusion3Pipeline",
        "transformer",
        (*_WORDS, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        _sd3,
    ),
    "FluxTransformer2DModel": Kind(
        "FluxPipeline", "transformer", (*_WORDS, "text_encoder_2", "tokenizer_2"), _flux
    ),
}

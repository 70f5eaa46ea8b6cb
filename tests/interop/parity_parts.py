"""Published systems in small: parts of diffusers pipelines with random weights, and recipes that read them.

A recipe made here is the shipped one but for sizes: paths to the saved parts, the picture's side, the number of
steps, and networks that a laptop runs. All else - text handling, schedule, prediction, sampler, guidance - stays
what the shipped file says, and is what the comparison proves.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import transformers
from diffusers.pipelines.deepfloyd_if import timesteps as respaced

from imagen_kit import recipe
from imagen_kit.pipeline import Pipeline, derive_seed
from imagen_kit.recipe import source

PROMPTS = ["a red Star", "two blue rings on grey " + "and so on " * 60]  # the second is cut by every encoder
NEGATIVES = ["Blurry", "a dull picture " * 50]
SEEDS = [3, 11]
STEPS, SIDE = 4, 64  # of what is painted in latents
ATOL = 1e-4  # pictures in [0, 1]; both sides are float32, with sums in another order and tables rounded otherwise
TOLD = 1e-3  # more than this differs a picture made with a choice of the recipe that is not the published one

Painter = Callable[[Sequence[str], Sequence[str] | None, bool, Sequence[int]], Tensor]

__all__ = ["diffusers", "respaced"]  # for the tests, which so are skipped without diffusers

# ---- networks ----------------------------------------------------------------------------------------------------


def randomised(build: Callable[[], Any], seed: int = 0, gain: float = 1.0) -> Any:
    """A module whose every weight is random and of unit gain, so that all of the input tells in the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().eval().requires_grad_(False)
        for p in module.parameters():
            noise = torch.randn(p.shape)
            p.copy_(gain * noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.2 * noise)
    return module


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer with a vocabulary of letters; the end token has the greatest id, as in the real one."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocab = {word: i for i, word in enumerate(["!", *letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def clip(width: int, projection: bool, act: str, seed: int) -> Any:
    """A text tower of two blocks, with the published towers' end token 2, which transformers reads as "the last"."""
    config = transformers.CLIPTextConfig(
        vocab_size=55,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return randomised(lambda: kind(config), seed, gain=2.0)


def t5_tokenizer() -> Any:
    """T5's tokenizer with a vocabulary of letters, great and small."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters]
    return transformers.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5(width: int = 24, seed: int = 5) -> Any:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=width,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomised(lambda: transformers.T5EncoderModel(config), seed, gain=2.0)


def vae(channels: int, scale: float, shift: float | None = None, quant: bool = True) -> Any:
    """An autoencoder of factor 8."""
    return randomised(
        lambda: diffusers.AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        ),
        seed=9,
    )


# ---- recipes -----------------------------------------------------------------------------------------------------

CODEC = {"name": "kl", "widths": [8, 8, 8, 8], "groups": 4, "blocks": 1}


def small(
    name: str, folder: Path, stages: Sequence[Mapping[str, Any]], told: Mapping[str, Any] | None = None
) -> Path:
    """The file of the shipped recipe ``name`` on the parts saved in ``folder``.

    Args:
        name: of the recipe.
        folder: holds the parts under the last names of the recipe's own paths: ``unet``, ``text_encoder`` ...;
            of a cascade in a folder a stage, ``0``, ``1`` ...
        stages: of each stage ``denoiser``, ``size`` and ``steps``; further ones are left out.
        told: other numbers that the first stage's network is told.
    """
    data = source.read(source.find(name))
    first = folder / "0" if len(stages) > 1 else folder
    if "text_encoder" in data:
        data["text_encoder"] = _encoder(data["text_encoder"], first)
    for i, (stage, change) in enumerate(zip(data["stages"], stages, strict=False)):
        home = folder / str(i) if len(stages) > 1 else folder
        stage["weights"] = str(home / stage["weights"].rsplit("/", 1)[-1])
        stage["denoiser"], stage["size"] = change["denoiser"], change["size"]
        stage["sampler"]["steps"] = change["steps"]
        if "codec" in stage:
            published = recipe.check.registries()["codec"].create(stage["codec"]["name"])
            own = {key: getattr(published, key) for key in ("channels", "scale", "shift")}
            quant = published.quant_conv is not None
            stage["codec"] = {**CODEC, **own, "quant": quant, "weights": str(home / "vae")}
        if told is not None and i == 0:
            stage["told"] = dict(told)
    data["stages"] = data["stages"][: len(stages)]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def _encoder(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A text encoder's part with its weights, and those of encoders within, in ``folder``."""
    out = {key: value for key, value in part.items() if key != "size"}
    if "encoders" in out:
        out["encoders"] = [_encoder(inner, folder) for inner in out["encoders"]]
    if "weights" in out:
        out["weights"] = str(folder / out["weights"].rsplit("/", 1)[-1])
    return out


# ---- pictures ----------------------------------------------------------------------------------------------------


def generators(seeds: Sequence[int], stage: int = 0) -> list[torch.Generator]:
    """What our pipeline draws a stage's noise from, a picture each; randn_tensor draws from such a list alike."""
    return [torch.Generator().manual_seed(derive_seed(seed, stage)) for seed in seeds]


def quiet(pipe: Any) -> Any:
    """The pipeline without its bars; prompts that are cut are not told."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painter(pipe: Any, scale: float, **more: Any) -> Painter:
    """What a text-to-picture pipeline of one stage paints: STEPS steps, SIDE pixels, options as published."""

    def theirs(prompts, negative, guided, seeds):
        options = {} if negative is None else {"negative_prompt": negative}
        return pipe(
            prompts,
            guidance_scale=scale if guided else 1.0,
            num_inference_steps=STEPS,
            generator=generators(seeds),
            height=SIDE,
            width=SIDE,
            output_type="pt",
            **options,
            **more,
        ).images

    return theirs


CASES = {
    "as shipped": {"prompts": PROMPTS[:1]},
    "two prompts away from two": {"prompts": PROMPTS, "negative": NEGATIVES},
    "unguided": {"prompts": PROMPTS, "guided": False},
}
# What cleaning takes away stands in it; diffusers does not clean without beautifulsoup4.
WEB = {"from the web": {"prompts": ["A red Star – FREE download at http://shop.com/a.jpg &amp; <b>#12</b>"]}}
CLASSES = {  # of DiT, whose prompts are numbers
    "classes": {"prompts": ["207", "88"]},
    "unguided classes": {"prompts": ["207", "88"], "guided": False},
}


class System:
    """A recipe in small beside the diffusers pipeline of the same parts.

    Args:
        file: of the recipe.
        theirs: ``theirs(prompts, negative, guided, seeds) -> (b, 3, h, w)`` in [0, 1]; guided as published, or not
            at all.
    """

    def __init__(self, file: Path, theirs: Painter):
        self.file, self._theirs = file, theirs
        self._wanted: dict[str, Tensor] = {}

    def build(self, *changes: str) -> Pipeline:
        """Our pipeline, after changes to the recipe."""
        return recipe.load(self.file, changes).build()

    @cached_property
    def ours(self) -> Pipeline:
        return self.build()

    def difference(self, case: str, *changes: str) -> float:
        """The greatest difference of any pixel between their picture and ours, after changes to the recipe."""
        told = {**CASES, **WEB, **CLASSES}[case]
        prompts, negative, guided = told["prompts"], told.get("negative"), told.get("guided", True)
        seeds = SEEDS[: len(prompts)]
        if case not in self._wanted:
            self._wanted[case] = self._theirs(prompts, negative, guided, seeds)
        ours, wanted = self.build(*changes) if changes else self.ours, self._wanted[case]
        bare = {stage.name: [s for s in stage.guidance if not s.needs] for stage in ours.stages}
        found = ours(prompts, negative=negative, seed=seeds, guidance=None if guided else bare).tensor
        assert found.shape == wanted.shape
        assert wanted.std() > 0.03  # a picture, not grey
        return float((found - wanted).abs().max())

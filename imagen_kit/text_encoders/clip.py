"""CLIP text towers in the Hugging Face format, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.errors import KitError, unknown
from imagen_kit.text_encoders import huggingface, register
from imagen_kit.text_encoders.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from imagen_kit.text_encoders.transformer import TransformerEncoder, tower_length

POOLED = ("eos", "projection")
_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "projection_dim",
    "hidden_act",
)
SIZES: dict[str, dict[str, Any]] = {
    name: {**dict(zip(_KEYS, numbers, strict=True)), "vocab_size": 49408, "max_position_embeddings": 77}
    for name, numbers in {
        "tiny": (64, 128, 4, 2, 48, "quick_gelu"),
        "vit-b-32": (512, 2048, 8, 12, 512, "quick_gelu"),
        "vit-l-14": (768, 3072, 12, 12, 768, "quick_gelu"),
        "vit-h-14": (1024, 4096, 16, 24, 1024, "gelu"),
        "vit-h-14-sd2": (1024, 4096, 16, 23, 512, "gelu"),  # without the last layer, which SD 2 does not read
        "vit-bigg-14": (1280, 5120, 20, 32, 1280, "gelu"),
    }.items()
}
# What a file may hold beyond the text tower: the image tower, the temperature, position ids of old files.
_SPARE = r"vision_model\.|visual_projection\.|logit_scale|.*\.position_ids$"


@register(
    "clip", family="CLIP ViT-L/14, ViT-H/14, ViT-bigG/14", paper="Radford et al. 2021, arXiv:2103.00020"
)
class ClipTextEncoder(TransformerEncoder):
    """CLIP text tower: causal, so padding at the end never changes a token.

    Args:
        weights: a folder in the Hugging Face layout (``config.json``, ``model.safetensors``; a text tower or
            a whole CLIP), ``package:...``, a hub id (``owner/name``, further segments name a folder in it),
            or ``random``.
        size: for random weights: ``tiny``, ``vit-b-32``, ``vit-l-14``, ``vit-h-14``, ``vit-h-14-sd2`` (Stable
            Diffusion 2's), ``vit-bigg-14``, or a dict of config fields. Default ``tiny``. Beside other weights it
            is what they must have, known without them.
        tokenizer: ``auto`` (the folder's own, else the byte-pair vocabulary that open_clip ships), ``bpe``,
            ``bytes``, or a folder or hub id. Ids are folded into a smaller vocabulary of random weights.
        max_length: most tokens of a prompt, start and end included; None for the tower's own (77).
        layer: ``last``, ``penultimate`` (Imagen's choice for CLIP) or a negative number ("clip skip").
        final_norm: apply the final layer norm to that layer (SD 2: yes; SDXL: no; the last layer always has
            it in SD 1).
        pooled: vector of a prompt: ``eos`` (last layer, normed, at the end token, width d), ``projection``
            (that times the text projection, width p), or None.
        padding: ``masked``; ``attended`` for Stable Diffusion (all 77 tokens reach the denoiser); ``kept``.
        pad_to_max: always ``max_length`` tokens (fixed shapes).
        dtype: ``auto`` (fp32), ``fp32``, ``bf16`` or ``fp16``.
        cache: number of prompts remembered.
        seed: of random weights.

    Raises:
        KitError: weights that are absent, truncated, of another model or of another shape; a projection they
            lack.
    """

    def __init__(
        self,
        weights: str | Path = "random",
        size: str | dict[str, Any] | None = None,
        tokenizer: str = "auto",
        max_length: int | None = None,
        layer: str | int = "last",
        final_norm: bool = True,
        pooled: str | None = "eos",
        padding: str = "masked",
        pad_to_max: bool = False,
        dtype: str = "auto",
        cache: int = 128,
        seed: int = 0,
    ):
        if pooled is not None and pooled not in POOLED:
            raise KitError(unknown("pooled vector", pooled, POOLED))
        network, words = _build(weights, size, tokenizer, seed, pooled == "projection")
        settings: Any = network.config
        longest = settings.max_position_embeddings
        super().__init__(
            "clip",
            network,
            words,
            depth=settings.num_hidden_layers,
            layer=layer,
            padding=padding,
            dtype=dtype,
            dim=settings.hidden_size,
            pooled_dim={None: None, "eos": settings.hidden_size, "projection": settings.projection_dim}[
                pooled
            ],
            max_length=tower_length("clip", max_length, longest),
            pad_to_max=pad_to_max,
            cache=cache,
        )
        self.depth = settings.num_hidden_layers
        self.final_norm = final_norm
        self.pooled = pooled

    @property
    def tower(self) -> Any:
        """The transformer itself; transformers versions differ in whether a model wraps it."""
        return getattr(self.network, "text_model", self.network)

    def _run(self, ids: Tensor, mask: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        plain = self.block == self.depth and self.final_norm
        out = self.tower(input_ids=ids, attention_mask=mask.long(), output_hidden_states=not plain)
        last = out.last_hidden_state  # normed
        tokens = last
        if not plain:
            hidden = out.hidden_states[self.block]
            tokens = self.tower.final_layer_norm(hidden) if self.final_norm else hidden
        if self.pooled is None:
            return tokens, None
        pooled = last[torch.arange(len(last), device=last.device), ends]
        if self.pooled == "projection":
            pooled = self.network.text_projection(pooled)  # type: ignore[operator]
        return tokens, pooled

    def _blocks(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        return self.tower(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states


def _build(
    weights: str | Path, size: str | dict[str, Any] | None, tokenizer: str, seed: int, projection: bool
) -> tuple[nn.Module, Tokenizer]:
    import transformers as hf

    model_class = hf.CLIPTextModelWithProjection if projection else hf.CLIPTextModel
    if str(weights) == "random":
        fields = SIZES.get(size or "tiny") if not isinstance(size, dict) else size
        if fields is None:
            raise KitError(unknown("clip size", size, SIZES))
        settings = huggingface.random_config(hf.CLIPTextConfig, fields, "clip")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = model_class(settings)
        return network, _tokenizer(tokenizer, None, settings)
    source = huggingface.locate(weights)
    settings = huggingface.config(source)
    if settings.model_type not in ("clip", "clip_text_model"):
        raise KitError(
            f"weights {str(weights)!r} hold a {settings.model_type!r} network; text encoder 'clip' reads "
            "CLIP text towers"
        )
    if settings.model_type == "clip":
        width = settings.projection_dim
        settings = settings.text_config
        settings.projection_dim = width
    huggingface.require_size("clip", source, settings, size, SIZES)
    spare = _SPARE if projection else _SPARE + r"|text_projection\."
    words = _tokenizer(tokenizer, source, settings)
    return huggingface.model(model_class, source, settings, spare), words


def _tokenizer(spec: str, source: huggingface.Source | None, settings: Any) -> Tokenizer:
    if spec == "bytes":
        return ByteTokenizer(settings.vocab_size)
    if spec not in ("auto", "bpe"):
        return huggingface.tokenizer(spec)
    if spec == "auto" and source is not None:
        found = huggingface.own_tokenizer(source)
        if found is not None:
            return found
    # OpenAI's towers (quick GELU) were used with end-token padding, open_clip's with 0.
    return BpeTokenizer(settings.vocab_size, None if settings.hidden_act == "quick_gelu" else 0)

"""The T5 family: T5, T5 v1.1, mT5, umT5 and ByT5 encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.hollow import hollow, is_hollow
from imagen_kit.text_encoders import huggingface, register
from imagen_kit.text_encoders.captions import cleaned, lowered
from imagen_kit.text_encoders.t5_network import KINDS, T5Network, T5Settings
from imagen_kit.text_encoders.t5_weights import EXECUTIONS, RandomWeights, StoredWeights, fill
from imagen_kit.text_encoders.tokenizers import (
    ByteTokenizer,
    MissingTokenizer,
    PreparedTokenizer,
    Tokenizer,
)
from imagen_kit.text_encoders.transformer import TransformerEncoder, precision

_KEYS = ("d_model", "d_ff", "num_heads", "num_layers", "d_kv", "vocab_size", "feed_forward_proj")
_V1_1 = {
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
    "xl": (2048, 5120, 32, 24),
    "xxl": (4096, 10240, 64, 24),
}
_BYT5 = {
    "small": (1472, 3584, 6, 12),
    "base": (1536, 3968, 12, 18),
    "large": (1536, 3840, 16, 36),
    "xl": (2560, 6720, 32, 36),
    "xxl": (4672, 12352, 64, 36),
}
_T5 = {"small": (512, 2048, 8, 6), "base": (768, 3072, 12, 12), "large": (1024, 4096, 16, 24)}


def _family(
    prefix: str, sizes: Mapping[str, tuple[int, ...]], vocab: int, act: str, kind: str
) -> dict[str, Any]:
    return {
        prefix + name: {"model_type": kind, **dict(zip(_KEYS, (*numbers, 64, vocab, act), strict=True))}
        for name, numbers in sizes.items()
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "t5", **dict(zip(_KEYS, (64, 128, 4, 2, 16, 384, "gated-gelu"), strict=True))},
    **_family("", _V1_1, 32128, "gated-gelu", "t5"),
    **_family("t5-", _T5, 32128, "relu", "t5"),
    **_family("mt5-", _V1_1, 250112, "gated-gelu", "mt5"),
    **_family("umt5-", {k: v for k, v in _V1_1.items() if k != "large"}, 256384, "gated-gelu", "umt5"),
    **_family("byt5-", _BYT5, 384, "gated-gelu", "t5"),
}


@register("t5", family="T5, T5 v1.1, mT5, umT5, ByT5", paper="Raffel et al. 2020, arXiv:1910.10683")
class T5TextEncoder(TransformerEncoder):
    """T5 encoder of any generation, as Imagen uses it: contextual embeddings of the last block, normalised.

    Padding never changes an embedding: it is hidden from attention, and relative positions do not see it. T5
    overflows in fp16, which is refused.

    Args:
        weights: a folder in the Hugging Face layout (``config.json`` of an encoder or an encoder-decoder and
            ``model.safetensors``), ``package:...``, a hub id (``owner/name``, further segments name a folder
            in it), or ``random``.
        size: for random weights: ``tiny``, ``small`` ... ``xxl`` (v1.1), ``t5-base``, ``mt5-base``,
            ``umt5-xxl``, ``byt5-small`` ..., or a dict of config fields (``model_type`` t5, mt5 or umt5).
            Default ``small``. Beside other weights it is what they must have, known without them.
        tokenizer: ``auto`` (the folder's own; bytes where the vocabulary is ByT5's and the folder has none),
            ``bytes``, or a folder or hub id. ``auto`` means bytes for random weights, folded into a smaller
            vocabulary; ``none`` leaves them without one.
        lowercase: read prompts in lower case, without blanks at their ends; ``cleaned``: also without what the
            captions lost that DeepFloyd IF and PixArt were trained on, see ``text_encoders.captions``.
        max_length: most tokens of a prompt, end token included (Imagen: 128); longer prompts are cut.
        layer: ``last``, ``penultimate`` or a negative number; T5's final norm is applied to all of them.
        padding: ``masked``; ``kept`` for DeepFloyd IF; ``attended`` for SD3 and FLUX.
        pad_to_max: always ``max_length`` tokens (fixed shapes).
        dtype: ``auto`` (fp32; bf16 from a billion parameters on), ``fp32`` or ``bf16``.
        cache: number of prompts remembered.
        seed: of random weights.
        execution: where the weights of the blocks are. ``whole``: in memory. ``packed``: in memory, in the order
            in which a CPU reads them: faster; see ``imagen_kit.performance.prepacking``. ``streamed``: in their
            file, from which each block is read at its turn, the next one meanwhile (of random weights it is drawn
            anew): an XXL encoder in the memory of its embeddings and two blocks, with the same embeddings bit for
            bit.
            ``int8``: in memory in eight bits with a scale for each row, half of bf16; see
            ``imagen_kit.performance.rowwise``.

    Raises:
        KitError: weights that are absent, truncated, of another model or of another shape; fp16.
    """

    fp16_safe = False

    def __init__(
        self,
        weights: str | Path = "random",
        size: str | dict[str, Any] | None = None,
        tokenizer: str = "auto",
        lowercase: bool | str = False,
        max_length: int = 128,
        layer: str | int = "last",
        padding: str = "masked",
        pad_to_max: bool = False,
        dtype: str = "auto",
        cache: int = 128,
        seed: int = 0,
        execution: str = "whole",
    ):
        if execution not in EXECUTIONS:
            raise KitError(unknown("t5 execution", execution, EXECUTIONS))
        network, source, words = _open(weights, size, tokenizer, seed)
        settings = network.settings
        held = precision("t5", dtype, network, self.fp16_safe)
        if not is_hollow():
            fill(network, source, execution, held)
        super().__init__(
            "t5",
            network,
            _prepared(words, lowercase),
            depth=settings.num_layers,
            layer=layer,
            padding=padding,
            dtype="bf16" if held == torch.bfloat16 else "fp32",
            dim=settings.d_model,
            pooled_dim=None,
            max_length=max_length,
            pad_to_max=pad_to_max,
            cache=cache,
        )

    def _run(self, ids: Tensor, mask: Tensor, ends: Tensor) -> tuple[Tensor, None]:
        return self.network(ids, mask, self.block), None

    def _blocks(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        network: Any = self.network
        return network.outputs(ids, mask)


def _open(
    weights: str | Path, size: str | dict[str, Any] | None, tokenizer: str, seed: int
) -> tuple[T5Network, Any, Tokenizer]:
    """The network without its weights, the source of those, and the tokenizer."""
    if str(weights) == "random":
        fields = SIZES.get(size or "small") if not isinstance(size, dict) else size
        if fields is None:
            raise KitError(unknown("t5 size", size, SIZES))
        network = _hollow(T5Settings.of(fields, strict=True))
        return network, RandomWeights(network, seed), _folded(tokenizer, network.settings.vocab_size)
    source = huggingface.locate(weights)
    config = huggingface.fields(source)
    if config.get("model_type") not in KINDS:
        raise KitError(
            f"weights {str(weights)!r} hold a {config.get('model_type')!r} network; text encoder 't5' reads "
            f"{', '.join(KINDS)}"
        )
    settings = T5Settings.of(config)
    huggingface.require_size("t5", source, settings, size, SIZES)
    words = _tokenizer(tokenizer, source, settings.vocab_size)
    network = _hollow(settings)
    return network, StoredWeights(source, network), words


def _prepared(words: Tokenizer, lowercase: bool | str) -> Tokenizer:
    """The tokenizer, told how prompts are written before it reads them."""
    if lowercase is False:
        return words
    if lowercase not in (True, "cleaned"):
        raise KitError(unknown("choice of lowercase", lowercase, ("false", "true", "cleaned")))
    return PreparedTokenizer(words, cleaned if lowercase == "cleaned" else lowered)


def _hollow(settings: T5Settings) -> T5Network:
    with hollow():
        return T5Network(settings)


def _folded(tokenizer: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of random weights."""
    if tokenizer == "none":
        return MissingTokenizer("t5")
    if tokenizer not in ("auto", "bytes"):
        return huggingface.tokenizer(tokenizer)
    return ByteTokenizer(vocab_size)


def _tokenizer(spec: str, source: huggingface.Source, vocab_size: int) -> Tokenizer:
    if spec == "bytes":
        return ByteTokenizer(vocab_size)
    found = huggingface.own_tokenizer(source) if spec == "auto" else huggingface.tokenizer(spec)
    if found is not None:
        return found
    if 259 <= vocab_size <= 384:  # ByT5's table: 256 bytes, 3 special tokens, up to 125 sentinels
        return ByteTokenizer(vocab_size)
    raise KitError(
        f"weights {str(source)!r} come without a tokenizer ({', '.join(huggingface.TOKENIZER_FILES[:2])}); "
        "name one with the option 'tokenizer' (a folder, a hub id, or 'bytes')"
    )

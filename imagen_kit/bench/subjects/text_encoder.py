"""Text encoders from token ids on: ours, and transformers' or open_clip's own modules with the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import text_encoders
from imagen_kit.bench import stored
from imagen_kit.bench.memory import Extra
from imagen_kit.bench.peers import library
from imagen_kit.bench.subject import OURS, Built, Subject
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import Work, attempt, chosen_peers
from imagen_kit.errors import KitError, unknown
from imagen_kit.text_encoders.transformer import TransformerEncoder

WEIGHTS = ("random", "stored")
#: Our encoder → (the options with which it needs no tokenizer, whose module it is compared with).
ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"tokenizer": "none"}, "transformers"),
    "clip": ({"tokenizer": "bytes", "pooled": "eos"}, "transformers"),
    "open_clip": ({"pooled": "projection"}, "open_clip"),
}


@register("text_encoder", names=lambda: sorted(ENCODERS))
def text_encoder(
    name: str,
    device: torch.device,
    *,
    size: str = "tiny",
    length: int = 77,
    batch: int = 1,
    dtype: str = "auto",
    execution: str = "whole",
    weights: str = "random",
    peers: str = "all",
) -> Built:
    """Prompts of given token ids to their embeddings; no tokenizer, nothing remembered.

    Of stored weights the reading is part of the row: the peak is at least the most that the process held while the
    encoder was made, so that what a row says is what a machine needs for it. Pages of a file that are mapped into
    memory count as long as they are there.

    T5's answer is compared token by token, CLIP's likewise, open_clip's by its pooled vector, which is what its
    own module answers. ``clip`` and ``open_clip`` are built on those modules, so there the peer shows what we add.

    Args:
        name: t5, clip or open_clip.
        device: where.
        size: of it, weights random.
        length: tokens of every prompt.
        batch: prompts.
        dtype: auto, fp32, bf16 or, for CLIP, fp16.
        execution: of T5's weights: whole, packed, streamed or int8.
        weights: ``random``: as numbers made here. ``stored``: T5's, written to files in bfloat16 first, in a
            temporary folder that is removed afterwards, and read from there; an XXL encoder takes 9.5 GB of disk.
        peers: all, none, or the one there is: transformers, open_clip.

    Raises:
        KitError: a value that there is not.
    """
    options, whose = ENCODERS[name]
    wanted = chosen_peers(peers, [whose])
    if weights not in WEIGHTS:
        raise KitError(unknown("weights of a text encoder", weights, WEIGHTS))
    if name == "t5":
        options = {**options, "execution": execution, "max_length": length}
    elif (execution, weights) != ("whole", "random"):
        chosen = f"execution {execution!r}" if execution != "whole" else f"weights {weights!r}"
        raise KitError(f"text encoder {name!r} has no {chosen}; only t5 has")
    folder = _stored(size, device) if weights == "stored" else None
    if folder is not None:
        options |= {"weights": folder.name, "tokenizer": "bytes"}
    with Extra(device) as reading:
        encoder: TransformerEncoder = text_encoders.create(
            name, **{"weights": "random", **options}, size=size, dtype=dtype, cache=0
        ).to(device)
    ids = torch.randint(
        3, _vocabulary(encoder) - 1, (batch, length), generator=torch.Generator().manual_seed(0)
    )
    ids[:, -1] = _vocabulary(encoder) - 1  # the end token of both CLIPs is the last there is
    ids = ids.to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ends = torch.full((batch,), length - 1, device=device)

    def ours() -> Tensor:
        tokens, pooled = encoder._run(ids, mask, ends)
        if name == "open_clip":
            assert pooled is not None
            return pooled
        return tokens

    def work(run: Callable[[], Tensor], module: nn.Module, note: str) -> Subject:
        return Work(
            torch.no_grad()(run), "prompts", batch, modules=[module], inputs=[ids, mask, ends], note=note
        )

    precision = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    mine = work(ours, encoder, f"{precision}, weights {execution}")
    if folder is not None:
        mine.loading, mine.note = reading.bytes, f"{mine.note}, read from files"
        mine.close = partial(_end, mine.close, folder)  # type: ignore[method-assign]
    built: Built = {OURS: mine}
    if whose in wanted:
        built[whose] = attempt(lambda: _peer(name, encoder, ids, execution, work))
    return built


def _stored(size: str, device: torch.device) -> tempfile.TemporaryDirectory[str]:
    """A folder with weights of that size; all that reading them takes is imported."""
    with tempfile.TemporaryDirectory() as small:
        stored.write("tiny", Path(small))
        text_encoders.create("t5", weights=small, tokenizer="bytes").to(device)
    folder = tempfile.TemporaryDirectory(prefix="imagen-kit-t5-")
    stored.write(size, Path(folder.name))
    return folder


def _end(close: Callable[[], None], folder: tempfile.TemporaryDirectory[str]) -> None:
    close()
    folder.cleanup()


def _vocabulary(encoder: Any) -> int:
    """Number of rows of its table of tokens."""
    tables = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
    return max(table.num_embeddings for table in tables)


def _peer(name: str, encoder: Any, ids: Tensor, execution: str, work: Callable[..., Subject]) -> Subject:
    if name == "open_clip":
        return work(lambda: encoder.network(ids), encoder.network, "its TextTransformer, which ours runs")
    if name == "clip":
        tower = encoder.network
        return work(lambda: tower(input_ids=ids)[0], tower, f"its {type(tower).__name__}, which ours runs")
    if execution not in ("whole", "packed"):
        raise KitError(f"transformers' T5 needs its weights in memory, and here they are {execution}")
    model = t5(encoder)
    whole = torch.ones_like(ids)
    return work(
        lambda: model(input_ids=ids, attention_mask=whole)[0],
        model,
        f"{type(model).__name__}, {'the same memory' if execution == 'whole' else 'the same weights'}",
    )


def t5(encoder: Any) -> nn.Module:
    """transformers' encoder of the same weights, in the same memory.

    Args:
        encoder: our ``t5``.

    Raises:
        KitError: transformers is not installed.
    """
    from imagen_kit.hollow import hollow_parameters

    transformers = library("transformers")
    settings = dict(vars(encoder.network.settings))
    prefix = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[settings.pop("model_type")]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    with hollow_parameters():
        model = getattr(transformers, f"{prefix}EncoderModel")(config)
    tensors = dict(encoder.network.state_dict())
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.to(encoder.device).eval()

"""Pretraining of a byte-level T5 on text alone; the encoder is then frozen and feeds the diffusion stages.

Three text-to-text tasks on captions of the pocket world (held-out combinations excluded):

* span corruption (Raffel et al. 2020): bytes replaced by sentinels are written out;
* translation, English ↔ Chinese;
* reading: the objects listed by place ("left: small red star; right: large blue ring; gray"), whatever the
  language and the order of mention, so that what belongs together is bound together in the features.

The task is told to the decoder (its first token), not to the encoder: the encoder always reads a bare caption,
exactly as it will when a denoiser uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.data.pocket import Scene, caption, sample_scenes
from imagen_kit.training.config import TrainConfig

PAD, EOS, BYTE_OFFSET, FIRST_SENTINEL = 0, 1, 3, 259  # ByT5's vocabulary
TASKS = {"corrupt": 380, "to_en": 381, "to_zh": 382, "read": 383}  # its last extra ids
IGNORE = -100


def reading(scene: Scene) -> str:
    """The scene's objects by place, first left or top."""
    names = [f"{o.size} {o.color} {o.shape}" for o in scene.objects]
    if scene.relation is None:
        return f"middle: {names[0]}; {scene.background}"
    if scene.relation in ("right of", "below"):
        names.reverse()
    places = ("left", "right") if scene.relation in ("left of", "right of") else ("top", "bottom")
    return f"{places[0]}: {names[0]}; {places[1]}: {names[1]}; {scene.background}"


def byte_ids(text: str) -> list[int]:
    """ByT5 ids of a text with its end token."""
    return [byte + BYTE_OFFSET for byte in text.encode()] + [EOS]


def corrupt(
    ids: list[int], generator: torch.Generator, share: float = 0.2, span: int = 8
) -> tuple[list[int], list[int]]:
    """Span corruption of one sequence: (input with sentinels, target with the missing bytes)."""
    body = ids[:-1]
    spans = max(1, round(len(body) * share / span))
    segment = len(body) // spans
    source: list[int] = []
    target: list[int] = []
    for k in range(spans):
        part = body[k * segment : (k + 1) * segment if k < spans - 1 else len(body)]
        length = min(len(part), int(torch.randint(span // 2, span * 3 // 2 + 1, (), generator=generator)))
        begin = int(torch.randint(len(part) - length + 1, (), generator=generator))
        source += [*part[:begin], FIRST_SENTINEL + k, *part[begin + length :]]
        target += [FIRST_SENTINEL + k, *part[begin : begin + length]]
    return [*source, EOS], [*target, EOS]


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """(b, longest) int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class TextTask:
    """T5 multi-task pretraining on pocket captions.

    Args:
        config: training settings; ``config.data`` takes ``name: pocket`` and ``pair_fraction``.
        model: arguments of ``transformers.T5Config`` (d_model, d_ff, d_kv, num_heads, num_layers, num_decoder_layers).
            A shallow decoder leaves the work, and so the understanding, to the encoder.
    """

    def __init__(self, config: TrainConfig, model: dict[str, Any]):
        from transformers import T5Config, T5ForConditionalGeneration

        self.config = config
        self.pair_fraction = float(config.data.get("pair_fraction", 0.8))
        torch.manual_seed(config.seed)
        fixed = {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "dropout_rate": 0.0,
            "decoder_start_token_id": PAD,
        }
        self.settings = T5Config(**{"vocab_size": 384, **model, **fixed})
        self.module: nn.Module = T5ForConditionalGeneration(self.settings)

    def _example(self, scene: Scene, generator: torch.Generator) -> tuple[list[int], int, list[int]]:
        pick = int(torch.randint(20, (), generator=generator))
        languages = ("en", "zh") if pick % 2 else ("zh", "en")
        source = byte_ids(caption(scene, languages[0]))  # type: ignore[arg-type]
        if pick < 3:
            source, target = corrupt(source, generator)
            return source, TASKS["corrupt"], target
        if pick < 10:
            task = TASKS["to_zh"] if languages[1] == "zh" else TASKS["to_en"]
            return source, task, byte_ids(caption(scene, languages[1]))  # type: ignore[arg-type]
        return source, TASKS["read"], byte_ids(reading(scene))

    def loss(self, module: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        scenes = sample_scenes(self.config.batch_size, generator, "train", self.pair_fraction)
        rows = [self._example(scene, generator) for scene in scenes]
        ids = pad([row[0] for row in rows], PAD).to(device)
        labels = pad([row[2] for row in rows], IGNORE).to(device)
        starts = torch.tensor([[row[1]] for row in rows], device=device)
        decoder_ids = torch.cat([starts, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, PAD)], 1)
        logits = module(input_ids=ids, attention_mask=ids != PAD, decoder_input_ids=decoder_ids).logits
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE)
        with torch.no_grad():
            right = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
        return {"loss": loss, "exact": right.float().mean()}

    @torch.no_grad()
    def write(self, module: nn.Module, texts: Sequence[str], task: str) -> list[str]:
        """Greedy decoding of a task ("to_en", "to_zh", "read") for each text."""
        device = next(module.parameters()).device
        ids = pad([byte_ids(text) for text in texts], PAD).to(device)
        out = module.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=ids != PAD,
            decoder_start_token_id=TASKS[task],
            max_new_tokens=120,
            do_sample=False,
        )
        decoded = []
        for row in out[:, 1:].tolist():
            row = row[: row.index(EOS)] if EOS in row else row
            decoded.append(
                bytes(i - BYTE_OFFSET for i in row if BYTE_OFFSET <= i < 259).decode(errors="replace")
            )
        return decoded

    def accuracy(self, module: nn.Module, n: int = 200, seed: int = 1) -> dict[str, float]:
        """Share of held-out captions that are translated and read without any error."""
        scenes = sample_scenes(n, torch.Generator().manual_seed(seed), "held_out", self.pair_fraction)
        en, zh = [caption(s, "en") for s in scenes], [caption(s, "zh") for s in scenes]
        pairs = {"to_zh": (en, zh), "to_en": (zh, en)}
        read = [reading(s) for s in scenes]
        pairs |= {"read_en": (en, read), "read_zh": (zh, read)}
        result = {}
        for key, (source, target) in pairs.items():
            written = self.write(module, source, "read" if key.startswith("read") else key)
            result[key] = sum(a == b for a, b in zip(written, target, strict=True)) / n
        return result

    def preview(self, module: nn.Module) -> str:
        return "  \n".join(f"{key}: {value:.3f}" for key, value in self.accuracy(module, 50).items())

    def export(self, weights: dict[str, Tensor], folder: Path, facts: dict[str, Any]) -> None:
        """The encoder alone, in the Hugging Face layout, bfloat16; ``card.json`` beside it."""
        import json

        from transformers import T5EncoderModel

        self.module.load_state_dict(weights)
        self.module.eval()
        accuracy = self.accuracy(self.module)
        encoder: Any = T5EncoderModel(self.settings)
        kept = {k: v for k, v in weights.items() if k.startswith(("shared.", "encoder."))}
        encoder.load_state_dict(kept, strict=False)
        encoder.config.tokenizer_class = "ByT5Tokenizer"
        encoder.to(torch.bfloat16).save_pretrained(folder)
        card = {
            **facts,
            "held_out_exact": accuracy,
            "parameters": sum(p.numel() for p in encoder.parameters()),
        }
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")

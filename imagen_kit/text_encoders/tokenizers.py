"""Tokenizers behind one call: ``tokenizer(prompts, max_length) -> list of token ids``, end token kept, no
padding.

``bytes`` and ``bpe`` need no file of the model's; others are read from a folder or the hub by transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from imagen_kit.errors import KitError


class Tokenizer(Protocol):
    """Prompts to token ids, at most ``max_length`` each with the end token kept; ``pad_id`` fills up a
    batch."""

    pad_id: int

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]: ...


class ByteTokenizer:
    """ByT5 (Xue et al. 2021): UTF-8 bytes + 3, then the end token 1; 0 pads. Any language, no vocabulary
    file.

    Args:
        vocab_size: size of the embedding table; bytes are folded into it when it has fewer than 259 entries
            (only sensible for random weights).
    """

    pad_id = 0
    end_id = 1
    offset = 3

    def __init__(self, vocab_size: int = 384):
        if vocab_size <= self.offset:
            raise KitError(
                f"a byte tokenizer needs a vocabulary of more than {self.offset} entries, not {vocab_size}"
            )
        self.fold = vocab_size - self.offset

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]:
        return [
            [self.offset + byte % self.fold for byte in prompt.encode("utf-8", "replace")[: max_length - 1]]
            + [self.end_id]
            for prompt in prompts
        ]


class BpeTokenizer:
    """CLIP's byte-pair tokenizer from the vocabulary that open_clip ships (49,408 entries, lower-cased text).

    Args:
        vocab_size: size of the embedding table; ids are folded below the start and end tokens when it is
            smaller (only sensible for random weights).
        pad_id: 0 as open_clip and CLIP bigG pad, 49407 as OpenAI's CLIP does; None pads with the end token.
    """

    def __init__(self, vocab_size: int = 49408, pad_id: int | None = 0):
        from open_clip import SimpleTokenizer

        if vocab_size < 3:
            raise KitError(f"the CLIP tokenizer needs a vocabulary of at least 3 entries, not {vocab_size}")
        self._bpe = SimpleTokenizer()
        size = min(vocab_size, self._bpe.vocab_size)
        self.start_id, self.end_id = size - 2, size - 1
        self.pad_id = self.end_id if pad_id is None else pad_id

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]:
        out = []
        for prompt in prompts:
            # Folding also makes text of special tokens spelled out in a prompt, which would end it early.
            words = [word % self.start_id for word in self._bpe.encode(prompt)]
            out.append([self.start_id, *words[: max_length - 2], self.end_id])
        return out


class PreparedTokenizer:
    """Another tokenizer that is shown prompts as ``prepare`` makes them, such as in lower case.

    Args:
        tokenizer: the other one.
        prepare: a prompt to the text that it is read as.
    """

    def __init__(self, tokenizer: Tokenizer, prepare: Callable[[str], str]):
        self._tokenizer, self._prepare = tokenizer, prepare
        self.pad_id = tokenizer.pad_id

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]:
        return self._tokenizer([self._prepare(prompt) for prompt in prompts], max_length)


class MissingTokenizer:
    """Stands in for the tokenizer of weights that came without one, and says so when it is given text.

    Args:
        kind: registered name of the text encoder.
    """

    pad_id = 0

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]:
        raise KitError(
            f"text encoder {self.kind!r} came without a tokenizer: put the folder of its tokenizer beside its "
            "weights, or set 'tokenizer' to a folder or hub id"
        )


class PretrainedTokenizer:
    """Any tokenizer that transformers reads from a folder or the hub (SentencePiece, byte-pair, ...)."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, prompts: Sequence[str], max_length: int) -> list[list[int]]:
        # Half a surrogate pair, as a terminal's bytes that are no UTF-8 become, is no text: "?", as among bytes.
        text = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]
        return self._tokenizer(text, truncation=True, max_length=max_length)["input_ids"]

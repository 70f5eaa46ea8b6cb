"""Where the weights of a T5 encoder come from, and how they are held: whole, packed, streamed, or in eight bits."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.text_encoders import huggingface
from imagen_kit.text_encoders.t5_network import T5Network

EXECUTIONS = ("whole", "packed", "streamed", "int8")
TABLE, TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"  # published under either name, or both
_SPARE = rf"decoder\.|lm_head\.|{TABLE_AGAIN}$"
_MAPPED = 2**28  # bytes from which weights are left in the file, mapped; smaller ones are copied out of it


class RandomWeights:
    """T5's initial values as a source of weights: each tensor from its name and the seed, so in any order.

    Normal, with the spread of T5's own initialisation; norms are 1.

    Args:
        network: whose tensors; it may be on the meta device.
        seed: of all of them.
    """

    def __init__(self, network: T5Network, seed: int):
        self.name, self.seed, self.settings = "random weights", seed, network.settings
        self.shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}

    def get(self, name: str) -> Tensor:
        """The tensor in float32."""
        if name.endswith("layer_norm.weight"):
            return torch.ones(self.shapes[name])
        told = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(told, "big") >> 1)
        return torch.empty(self.shapes[name]).normal_(0, self._spread(name), generator=generator)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def _spread(self, name: str) -> float:
        sizes, layer = self.settings, name.split(".")[-2]
        fan_in = {
            "shared": 1,
            "q": sizes.d_model * sizes.d_kv,  # logits are not divided by √d_kv
            "o": sizes.num_heads * sizes.d_kv,
            "wo": sizes.d_ff,
        }
        return fan_in.get(layer, sizes.d_model) ** -0.5


class StoredWeights:
    """The tensors of a folder or of the hub, checked to be exactly those of ``network``.

    Raises:
        KitError: unreadable, truncated, missing, extra or misshapen tensors, named.
    """

    def __init__(self, source: huggingface.Source, network: T5Network):
        self._tensors = huggingface.tensors(source)
        wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        self._table = TABLE if TABLE in self._tensors.shapes else TABLE_AGAIN
        if self._table in self._tensors.shapes:
            wanted[self._table] = wanted.pop(TABLE)
        huggingface.fitted(source, self._tensors, wanted, "T5Network", _SPARE)

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored, its memory shared with the file."""
        return self._tensors.get(self._table if name == TABLE else name)

    def release(self, name: str) -> None:
        """Its memory may go."""
        self._tensors.release(self._table if name == TABLE else name)


def fill(network: T5Network, source: Any, execution: str, dtype: torch.dtype) -> None:
    """Give ``network``, which is on the meta device, its weights.

    Args:
        network: it is changed in place: its blocks are replaced where they are not held ``whole``.
        source: ``RandomWeights`` or ``StoredWeights``.
        execution: one of ``EXECUTIONS``.
        dtype: of the weights in memory.
    """
    if execution == "streamed":
        from imagen_kit.performance.streaming import Streamed

        blocks = network.encoder.block
        prefixes = [f"encoder.block.{i}." for i in range(len(blocks))]
        network.encoder.block = Streamed(blocks, source, prefixes, dtype)
    elif execution == "int8":
        _quantise(network, source, dtype)
    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    for path, module in network.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                held = _held(source, f"{path}.{leaf}", dtype, copy=size < _MAPPED)
                setattr(module, leaf, nn.Parameter(held, requires_grad=False))
    if execution == "packed":
        from imagen_kit.performance.prepacking import prepack

        prepack(network)


def _quantise(network: T5Network, source: Any, dtype: torch.dtype) -> None:
    """Every linear layer in eight bits, one after the other, so that few are ever there in more."""
    from imagen_kit.performance.rowwise import Int8Linear

    for path, module in list(network.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                key = f"{path}.{name}.weight"
                layer = Int8Linear(child.in_features, child.out_features)
                setattr(module, name, layer.take(source.get(key)))
                source.release(key)


def _held(source: Any, name: str, dtype: torch.dtype, copy: bool) -> Tensor:
    tensor = source.get(name)
    held = tensor.to(dtype, copy=copy)
    if held.data_ptr() != tensor.data_ptr():
        source.release(name)
    return held

"""8-bit weights through torchao, for the linear layers of a network's repeated blocks.

    int8          weights in int8 with a scale a row, activations in int8 with a scale a token, made at every call
    int8_weights  weights in int8 with a scale a row, widened for the product: less memory, no less arithmetic
    fp8           weights and activations in float8 (e4m3) with scales; GPUs of compute capability 8.9 and above

Embedders, last layers and the modulation stay as they are: they hold few weights, and what they say acts on every
token. An 8-bit scale s rounds by at most s/2, so that a row w of weights changes the answer to x by at most
max|w|/254·Σ|x| (``int8_weights``); with activations rounded too, by that and max|x|/254·Σ|w|.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from imagen_kit.denoisers.layers.activated import LinearGelu
from imagen_kit.errors import KitError
from imagen_kit.performance.regions import blocks

#: Children of blocks that make scales, shifts and gates out of one vector, or positions out of none.
UNTOUCHED = ("adaLN_modulation", "modulation", "img_mod", "txt_mod", "embed", "emb_linear", "places")
MULTIPLE = 16  # of both widths: what the 8-bit products of GPUs take
CAPABILITY = (8, 9)


def quantise(module: nn.Module, kind: str, device: torch.device | str) -> int:
    """Quantise the linear layers of the repeated blocks in place; how many they are.

    Args:
        module: the network, its weights loaded, on the device and in its dtype.
        kind: ``int8``, ``int8_weights`` or ``fp8``.
        device: where it runs.

    Raises:
        KitError: torchao is not installed; a device without float8; no layer to quantise.
    """
    if find_spec("torchao") is None:
        raise KitError(f"quantise {kind} needs torchao; pip install 'imagen-kit[quant]'")
    _require_float8(kind, torch.device(device))
    chosen = {id(layer) for block in blocks(module) for layer in layers(block)}
    if not chosen:
        raise KitError(
            f"quantise {kind}: {type(module).__name__} has no linear layer in its blocks whose widths are "
            f"multiples of {MULTIPLE}"
        )
    try:
        from torchao.quantization import quantize_
    except ImportError as error:  # made for another version of torch
        reason = str(error).strip().splitlines()[0]
        raise KitError(f"quantise {kind}: the installed torchao cannot be imported ({reason})") from error
    quantize_(module, _config(kind, module), filter_fn=lambda layer, _: id(layer) in chosen)
    return len(chosen)


def layers(block: nn.Module) -> list[nn.Linear]:
    """The linear layers of a block that are quantised: all over tokens, of fitting widths."""
    found = []
    for name, layer in block.named_modules():
        fits = type(layer) in (nn.Linear, LinearGelu) and not (
            layer.in_features % MULTIPLE or layer.out_features % MULTIPLE  # type: ignore[operator]
        )
        if fits and not any(part in UNTOUCHED for part in name.split(".")):
            found.append(layer)
    return found  # type: ignore[return-value]


def _require_float8(kind: str, device: torch.device) -> None:
    if kind != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise KitError(
            f"quantise fp8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or above, "
            f"not {device}; choose int8"
        )


def _config(kind: str, module: nn.Module) -> Any:
    from torchao import quantization

    if kind == "int8":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    if kind == "int8_weights":
        return quantization.Int8WeightOnlyConfig()
    from torchao.quantization.granularity import PerRow

    from imagen_kit.performance.precision import computing_dtype

    # a scale a row is the finer choice; its kernel takes bfloat16 alone
    by_row = computing_dtype(module) == torch.bfloat16
    config = quantization.Float8DynamicActivationFloat8WeightConfig
    return config(granularity=PerRow()) if by_row else config()

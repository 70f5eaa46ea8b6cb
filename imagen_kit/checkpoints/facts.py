"""What a checkpoint holds and costs, told from names, shapes and config: no weight is read."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagen_kit.checkpoints import formats, loading
from imagen_kit.checkpoints.formats import Config, Format
from imagen_kit.checkpoints.loading import Origin, Source
from imagen_kit.checkpoints.reading import open_checkpoint
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError

TOKENS = 77  # of text in an evaluation, as CLIP and IF read them
SIDE = 64  # of x, where neither the format nor a config tells
_SIDES = ("sample_size", "image_size", "input_size")  # names that configs have for it


@dataclass(frozen=True)
class Facts:
    """About one checkpoint.

    Attributes:
        origin: format, part and constructor arguments.
        size: registered name of that size, or None where it is none of the named ones.
        parameters: number of trained numbers.
        dtypes: how the file stores them, most first.
        bytes: of its tensors.
        flops: of one evaluation (a multiply-add is two), or None where the part cannot be tried.
        evaluation: what that evaluation is of, in words.
    """

    origin: Origin
    size: str | None
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int
    flops: int | None
    evaluation: str


def describe(path: str | Path, kind: str | None = None, format: str | None = None) -> Facts:
    """Facts about the checkpoint at ``path``; arguments and errors as those of ``load``."""
    opened = open_checkpoint(path, kind)
    if opened.origin is not None:
        return facts_of(opened.source, opened.origin, loading.OURS)
    part, origin = loading.recognise(opened.source, format, opened.config, kind)
    return facts_of(part, origin)


def facts_of(part: Source, origin: Origin, form: Format | None = None) -> Facts:
    """Facts about the tensors of ``part`` in the format ``form``, the origin's by default."""
    module = loading.hollow(origin)
    trained = {name for name, _ in module.named_parameters()}
    steps = loading.fitted(module, part, form or formats.get(str(origin.format)), origin.kwargs)
    parameters = sum(
        math.prod(part.shapes[name]) for step in steps if trained & set(step.targets) for name in step.sources
    )
    stored: dict[str, int] = {}
    total = 0
    for name, shape in part.shapes.items():
        dtype = part.get(name).dtype
        count = math.prod(shape)
        stored[str(dtype).removeprefix("torch.")] = stored.get(str(dtype).removeprefix("torch."), 0) + count
        total += count * dtype.itemsize
    flops, evaluation = _flops(module, origin)
    return Facts(
        origin,
        _named_size(module, origin),
        parameters,
        tuple(sorted(stored, key=lambda name: -stored[name])),
        total,
        flops,
        evaluation,
    )


def _flops(module: nn.Module, origin: Origin) -> tuple[int | None, str]:
    from torch.utils.flop_counter import FlopCounterMode

    module = module.to("meta")
    run = {"denoiser": _evaluate, "codec": _decode, "text_encoder": _encode}[origin.kind]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        try:
            said = run(module, origin)
        except (KitError, RuntimeError, NotImplementedError, AttributeError, TypeError):
            return None, "unknown"
    return counter.get_total_flops(), said


def _evaluate(module: Any, origin: Origin) -> str:
    needs = module.inputs
    side = _side(origin.kwargs, origin.config)
    side += -side % needs.multiple
    text, low = needs.context_dim, needs.low_res_channels
    cond = Cond(
        tokens=torch.empty(1, TOKENS, text) if text else None,
        mask=torch.ones(1, TOKENS, dtype=torch.bool) if text else None,
        pooled=torch.empty(1, needs.pooled_dim) if needs.pooled_dim else None,
        labels=None if needs.num_classes is None else torch.zeros(1, dtype=torch.long),
        low_res=torch.empty(1, low, side, side) if low else None,
        low_res_level=torch.empty(1) if low else None,
        size=torch.empty(1, needs.size_numbers) if getattr(needs, "size_numbers", 0) else None,
        guidance=torch.empty(1),
    )
    module(torch.empty(1, needs.in_channels, side, side), torch.empty(1), cond)
    return f"one evaluation of {needs.in_channels}×{side}×{side}" + (
        f" with {TOKENS} text tokens" if text else ""
    )


def _decode(module: Any, origin: Origin) -> str:
    module.decode(torch.empty(1, module.channels, SIDE, SIDE))
    return f"decoding one picture of {SIDE * module.factor}×{SIDE * module.factor}"


def _encode(module: Any, origin: Origin) -> str:
    length = min(TOKENS, module.max_length)
    mask = torch.ones(1, length, dtype=torch.bool)
    ids = torch.zeros(1, length, dtype=torch.long)
    module._run(ids, mask, torch.zeros(1, dtype=torch.long))
    return f"encoding {length} tokens"


def _side(kwargs: dict[str, Any], config: Config | None) -> int:
    """Side of x that the network was made for."""
    found = kwargs.get("_size") or next((config[key] for key in _SIDES if config and config.get(key)), SIDE)
    return int(found if isinstance(found, int | float) else max(found))


def _named_size(module: nn.Module, origin: Origin) -> str | None:
    """The registered name, if any, that builds a network of the same tensors."""
    registry = import_module(f"imagen_kit.{origin.kind}s").registry
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in registry.names():
        factory = registry.get(name)
        if inspect.isclass(factory) or factory.__module__ != type(module).__module__:
            continue
        taken = inspect.signature(factory).parameters
        arguments = {key: value for key, value in origin.arguments().items() if key in taken}
        try:
            other = loading.hollow(Origin(origin.kind, name, arguments))
        except (KitError, TypeError):
            continue
        if {name: tensor.shape for name, tensor in other.state_dict().items()} == own:
            return name
    return None

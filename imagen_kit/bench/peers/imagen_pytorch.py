"""imagen-pytorch's U-Net at the widths of one of ours: another network, so a neighbour in size and not a twin.

Axes: b batch, c channels, h w picture.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.work import Told
from imagen_kit.errors import KitError

PACKAGE = "imagen_pytorch"


def library() -> Any:
    """Its file ``imagen_pytorch.py`` alone.

    The package as a whole imports a trainer with its data libraries, and the file asks the hub for the width of a
    T5 while it is imported: neither is needed for the network, and a benchmark must run without a network
    connection.

    Raises:
        KitError: it is not installed, or does not import here.
    """
    whole = sys.modules.get(PACKAGE)
    if whole is not None and hasattr(whole, "Unet"):
        return whole
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise KitError("imagen_pytorch is not installed (pip install imagen-pytorch)")
    try:
        with _without_its_package(list(found.submodule_search_locations)), _told_width():
            return importlib.import_module(f"{PACKAGE}.{PACKAGE}")
    except ImportError as error:
        line = " ".join(str(error).split())[:200]
        raise KitError(f"imagen_pytorch is installed, but does not import here: {line}") from error


@contextmanager
def _without_its_package(folders: list[str]) -> Iterator[None]:
    """An empty package in its place, forgotten afterwards together with what was imported below it."""
    empty = ModuleType(PACKAGE)
    empty.__path__ = folders
    sys.modules[PACKAGE] = empty
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]


@contextmanager
def _told_width() -> Iterator[None]:
    """A T5 config that is not looked up: it is the default of an argument that is always given here."""
    import transformers

    kind: Any = transformers.T5Config
    kind.from_pretrained = classmethod(lambda cls, name, **options: cls(d_model=768))
    try:
        yield
    finally:
        del kind.from_pretrained  # the inherited one again


def comparable(network: Any) -> bool:
    """Whether ``network`` is a U-Net on pictures (``unet``, ``efficient_unet``, ``adm``) that reads text or nothing."""
    wanted = getattr(network, "inputs", None)
    kinds = ("unet", "efficient_unet", "adm")
    return (
        wanted is not None
        and wanted.kind in kinds
        and wanted.in_channels == 3
        and wanted.num_classes is None
        and wanted.pooled_dim is None
    )


def neighbour(network: Any) -> nn.Module:
    """A ``Unet`` with the levels, blocks, attention and text width of ``network``, float32, at its own initial values.

    Args:
        network: one that is ``comparable``.

    Raises:
        KitError: not such a network, or the package cannot be had.
    """
    if not comparable(network):
        raise KitError(f"imagen_pytorch's Unet has no like of a {type(network).__name__} of these inputs")
    wanted = network.inputs
    module = library()
    levels = [_level(units) for units in network.down]
    width, text = levels[0][0], wanted.context_dim
    device = next(network.parameters()).device
    attended = tuple(attends for _, _, attends in levels)
    heads = max(2, max(channels for channels, _, _ in levels) // 64)
    with _silent(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = module.Unet(
            dim=width,
            dim_mults=tuple(round(channels / width) for channels, _, _ in levels),
            num_resnet_blocks=tuple(blocks for _, blocks, _ in levels),
            layer_attns=attended,
            layer_cross_attns=attended if text is not None else False,
            text_embed_dim=text or width,
            cond_on_text=text is not None,
            channels=wanted.in_channels,
            channels_out=network.out_channels,
            attn_heads=heads,
            lowres_cond=bool(wanted.low_res_channels),
            memory_efficient=wanted.kind == "efficient_unet",
        )
    return model.to(device).train(network.training)


def _level(units: Any) -> tuple[int, int, bool]:
    """(channels, blocks, whether it attends) of one of our levels."""
    return units[-1].res.conv2.out_channels, len(units), units[-1].attention is not None


@contextmanager
def _silent() -> Iterator[None]:
    """Without the advice that it prints about small widths."""
    with redirect_stdout(io.StringIO()):
        yield


def call(model: nn.Module, told: Told) -> Callable[..., Tensor]:
    """``model`` as a function of no argument: (b, c, h, w); it may be handed the model compiled."""
    cond, x = told.cond, told.x
    arguments: dict[str, Any] = {}
    if cond.tokens is not None:
        every = torch.ones(cond.tokens.shape[:2], dtype=torch.bool, device=x.device)
        arguments = {"text_embeds": cond.tokens, "text_mask": every if cond.mask is None else cond.mask}
    if cond.low_res is not None and cond.low_res_level is not None:
        arguments |= {"lowres_cond_img": cond.low_res, "lowres_noise_times": cond.low_res_level.to(x.dtype)}
    times = told.times.to(x.dtype)
    return lambda run_by=model: run_by(x, times, **arguments)

"""Weights of a recipe's networks: found beside it, in the kit or on the hub, in any format known, and fitted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagen_kit import weights_path
from imagen_kit.checkpoints import loading, reading
from imagen_kit.errors import KitError
from imagen_kit.hollow import hollow_parameters, sketched
from imagen_kit.registry import Registry
from imagen_kit.weights import check_fit, load_strict, read_header

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
# Arguments that no checkpoint tells: how the network is wired to the recipe, and how it is run.
_SURROUNDINGS = ("time_scale", "runtime", "tile", "overlap")


def locate(weights: str, folder: Path) -> Path:
    """The file or folder that ``weights`` names: beside the recipe, from the working folder, on the hub.

    Raises:
        KitError: there is none, with the nearest one, or it cannot be downloaded.
    """
    if weights.startswith(weights_path.PREFIX):
        return weights_path.resolve(weights)
    here = Path(weights).expanduser()
    beside = folder / here
    if here.exists() and not beside.exists():
        return here
    if not beside.exists() and here.suffix not in reading.SUFFIXES and _HUB_ID.fullmatch(weights):
        return _download(weights)
    return weights_path.resolve(beside)


def inspect_file(path: Path, kind: str) -> None:
    """KitError unless ``path`` is a checkpoint whose tensors can be listed; none of them is read."""
    if path.suffix == ".safetensors":
        read_header(path)
    else:
        reading.open_checkpoint(path, kind)


def load_network(kind: str, registry: Registry, name: str, options: dict[str, Any], path: Path) -> nn.Module:
    """The part ``name`` with the weights at ``path``, in float32 on the CPU.

    A file of the part's own tensors fills it. Of a community's checkpoint the format tells the network's
    details, which may be finer than the recipe's; it must be the same kind of network for the same inputs.

    Args:
        kind: ``denoiser`` or ``codec``.
        registry: of the part's kind.
        name, options: of the part, wired.
        path: of a file or folder.

    Raises:
        KitError: damaged, of no known format, or not the network that the recipe describes.
    """
    make = partial(registry.create, name, **options)
    asked = sketched(make)
    if not isinstance(asked, nn.Module):
        raise KitError(f"{kind} {name!r} has no weights; leave them out")
    own = {key: tuple(tensor.shape) for key, tensor in asked.state_dict().items()}
    if path.suffix == ".safetensors" and set(read_header(path)) - {"__metadata__"} == set(own):
        return _filled(asked, make, path)
    opened = reading.open_checkpoint(path, kind)
    form = None
    if opened.origin is not None:
        source, origin, form = opened.source, opened.origin, loading.OURS
    else:
        try:
            source, origin = loading.recognise(opened.source, None, opened.config, kind)
        except KitError:
            if path.suffix != ".safetensors":
                raise
            check_fit(asked, path)  # tells what is missing and extra
            raise
    takes = inspect.signature(registry.get(origin.part)).parameters
    told = {key: options[key] for key in _SURROUNDINGS if key in options and key in takes}
    origin = replace(origin, kwargs={**origin.kwargs, **told})
    _require_same(asked, loading.hollow(origin), kind, name, path)
    return loading.finish(source, origin, dtype=torch.float32, format=form)


def _filled(asked: nn.Module, make: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The module with its own tensors: a small one copies them, a larger one leaves them in the file, mapped."""
    if not any(p.is_meta for p in asked.parameters()):
        load_strict(asked, path)
        return asked
    check_fit(asked, path)
    with hollow_parameters():
        module = make()
    loading.fill(module, reading.MappedSafetensors(path), loading.OURS, {}, dtype=torch.float32)
    if getattr(module, "channels_last", False):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _require_same(asked: nn.Module, found: nn.Module, kind: str, name: str, path: Path) -> None:
    """KitError where a checkpoint's network is another than the recipe's or is fed otherwise."""
    facts = [_facts(asked), _facts(found)]
    differing = [key for key in facts[0] if facts[0][key] != facts[1].get(key)]
    if type(asked) is not type(found):
        raise KitError(f"weights {path} are of a {type(found).__name__}, not of a {kind} {name!r}")
    if differing:
        told = ", ".join(f"{key} {facts[1].get(key)} (the recipe's {facts[0][key]})" for key in differing)
        raise KitError(f"weights {path} do not fit {kind} {name!r}: {told}")


def _facts(module: nn.Module) -> Mapping[str, Any]:
    """What a network is fed with and answers."""
    inputs = getattr(module, "inputs", None)
    own = {key: getattr(module, key, None) for key in ("out_channels", "channels", "factor")}
    fed = dict(vars(inputs)) if inputs else {}
    if not fed.get("low_res_channels"):
        fed.pop("low_res_noised", None)  # means nothing then
    return {**fed, **own}


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    owner, name, *inside = hub_id.split("/")
    folder = "/".join(inside)
    start = f"{folder}/" if folder else ""
    try:
        for endings in (("json", "safetensors"), ("bin",)):  # pickles only where there is nothing else
            root = snapshot_download(
                f"{owner}/{name}",
                allow_patterns=[f"{start}*.{ending}" for ending in endings],
                ignore_patterns=["*.fp16.*", "*non_ema*", f"{start}*/*"],  # their * goes into folders too
            )
            if any((Path(root) / folder).glob("*.safetensors")):
                break
    except Exception as error:  # its errors are many; one line tells them apart
        line = " ".join(str(error).split())[:200]
        raise KitError(
            f"weights {hub_id!r} are no file or folder here, nor to be had from the hub: {line}"
        ) from error
    found = Path(root) / folder
    if not any(file.suffix in reading.SUFFIXES for file in found.glob("*")):
        where = f"folder {folder!r}" if folder else "first folder"
        raise KitError(f"weights {hub_id!r}: the hub's {owner}/{name} holds no weights in its {where}")
    return found

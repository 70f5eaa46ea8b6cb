"""Community checkpoints: found out what they are, loaded strictly, written back bit for bit.

    load(path)                      a denoiser, codec or text encoder from a file or folder
    from_state_dict(tensors)        the same from tensors at hand
    detect(shapes, config)          the format of a file
    save(module, path, layout=...)  ours, or the official or diffusers layout

Adding a format is one file in this package and one test row. The file holds, for each way in which a community
stores an architecture, how its constructor's arguments follow from config or shapes, and the rules between its
tensor names and ours, and registers both:

    from imagen_kit.checkpoints.formats import Format, register
    from imagen_kit.checkpoints.rules import Concat, Rename

    def _configure(shapes, config):                    # arguments of denoisers.create("mynet", **arguments)
        config = config or {}                          # None when the file comes without one: then the shapes tell
        width = shapes["embed.weight"][0]              # a tensor that is not there becomes a plain error by itself
        return {"width": width, "depth": shapes.count("layers.{i}.{rest}"), "heads": config.get("heads", width // 64)}

    def _rules(arguments):                             # names that are the same on both sides need no rule
        return [
            Rename("layers.{i}.{rest}", "blocks.{i}.{rest}"),
            Concat(["layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"], "blocks.{i}.qkv.weight"),
        ]

    signature = ("layers.{i}.q.weight",)               # tensors that tell such a file apart
    register(Format("mynet_official", "denoiser", "mynet", "official", _configure, _rules, has=signature))

Put narrower templates before wider ones: the first that fits a name is taken. Everything else is done here: the
prefix of whole-system files, strict checks in the file's own names, memory mapping, writing back. An argument whose
key begins with an underscore reaches ``rules`` but not the constructor. Where outputs depend on a choice that
neither shapes nor config tell, take the published models'. The test row: a function in
``tests/checkpoints/calls_mynet.py`` that feeds a fixture's inputs to the module (``CALLS["mynet_official"]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.checkpoints.formats import Format, Found, Shapes, detect, get, names
from imagen_kit.checkpoints.loading import OURS, Origin, Tensors, finish, recognise
from imagen_kit.checkpoints.reading import open_checkpoint
from imagen_kit.checkpoints.writing import save
from imagen_kit.errors import KitError

__all__ = [
    "Format",
    "Found",
    "Origin",
    "Shapes",
    "detect",
    "from_state_dict",
    "get",
    "load",
    "names",
    "save",
]


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kind: str | None = None,
    format: str | None = None,
) -> nn.Module:
    """A denoiser, codec or text encoder from a community's checkpoint or one of ours.

    Tensors are mapped, not copied, where file and network agree in them, so that the peak of memory is that of the
    weights. The file must stay as it is while the network is in use (replacing it by a rename is harmless).

    Args:
        path: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file; a folder of diffusers or transformers
            (config.json, one file or shards with an index); a whole diffusers pipeline's folder.
        device: where the network goes, tensor by tensor; ``meta`` builds and checks it without reading weights.
        dtype: of its floating tensors; by default as they are stored.
        kind: ``denoiser`` (the default where there is one), ``codec`` or ``text_encoder``, from files and folders
            of whole systems.
        format: name of the format (see ``names``), where the file fits several.

    Returns:
        the module in evaluation mode; ``module.checkpoint_origin`` tells what it came from.

    Raises:
        KitError: not there, empty, truncated, a pickle with code in it (never run), no known architecture, or tensors
            missing, extra or misshapen: one line that lists them.
    """
    opened = open_checkpoint(path, kind)
    if opened.origin is not None:
        if kind not in (None, opened.origin.kind):
            raise KitError(f"{opened.source.name} holds a {opened.origin.kind}, not a {kind}")
        return finish(opened.source, opened.origin, device, dtype, OURS)
    part, origin = recognise(opened.source, format, opened.config, kind)
    return finish(part, origin, device, dtype)


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    format: str | None = None,
    config: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> nn.Module:
    """The module whose tensors these are, sharing their memory where the format only renames them.

    Args:
        state_dict: tensors under the community's names; of a whole system's, those of one part are taken.
        format: name of the format (see ``names``); found out by default.
        config: the community's config (config.json or constructor arguments); without it sizes follow from
            the shapes and from the published models.
        kind: ``denoiser``, ``codec`` or ``text_encoder``, where the tensors are a whole system's.

    Returns:
        the module in evaluation mode, in the tensors' own dtype and device.

    Raises:
        KitError: no known architecture, or tensors missing, extra or misshapen: one line that lists them.
    """
    part, origin = recognise(Tensors(state_dict), format, config, kind)
    return finish(part, origin)

"""Writing a loaded module back: our layout, the official one, or a folder of diffusers or transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imagen_kit.checkpoints import formats
from imagen_kit.checkpoints.formats import LAYOUTS, Format
from imagen_kit.checkpoints.loading import Origin
from imagen_kit.checkpoints.reading import ORIGIN
from imagen_kit.checkpoints.rules import Ignore, plan
from imagen_kit.errors import KitError, unknown
from imagen_kit.files import replacing, require_writable
from imagen_kit.weights import save_safetensors


def save(module: nn.Module, path: str | Path, layout: str = "ours", origin: Origin | None = None) -> Path:
    """Write ``module`` atomically; reading it again gives the same bits.

    Args:
        module: loaded by ``load`` or ``from_state_dict``, or any other with its ``origin``.
        path: a ``.safetensors`` file; a folder for the diffusers layout, which gets a config.json as well.
        layout: ``ours`` (the module's own names, with a note that lets ``load`` rebuild it), ``official``,
            ``diffusers`` or the name of a format.
        origin: what the module is, where it did not come from a checkpoint: ``Origin(kind, part, kwargs)``.

    Returns:
        what was written.

    Raises:
        KitError: an unknown layout, one that has no format for this part or cannot say it, or a place that cannot
            be written.
    """
    origin = origin or getattr(module, "checkpoint_origin", None)
    if origin is None:
        raise KitError(
            f"this {type(module).__name__} came from no checkpoint; say what it is with "
            "origin=Origin(kind, part, arguments)"
        )
    path = Path(path)
    if layout == "ours":
        _require_file(path)
        return save_safetensors(path, module.state_dict(), {ORIGIN: origin.dump()})
    format = format_for(origin, layout)
    tensors = _foreign(module, format, origin)
    if format.layout == "official":
        _require_file(path)
        return save_safetensors(path, tensors)
    return _save_folder(path, tensors, format, origin)


def format_for(origin: Origin, layout: str) -> Format:
    """The format of ``layout`` for a part; the one it came from where that has the layout."""
    if layout in formats.names():
        format = formats.get(layout)
        if (format.kind, format.part) != (origin.kind, origin.part):
            raise KitError(f"checkpoint format {layout!r} holds a {format.part}, not a {origin.part}")
        return format
    if layout not in LAYOUTS:
        raise KitError(unknown("checkpoint layout", layout, ("ours", *LAYOUTS)))
    fitting = [
        format
        for format in map(formats.get, formats.names())
        if (format.kind, format.part, format.layout) == (origin.kind, origin.part, layout)
    ]
    own = [format for format in fitting if format.name == origin.format]
    if own:
        return own[0]
    able = [format for format in fitting if _can_say(format, origin)]
    if len(able) == 1:
        return able[0]
    if not fitting:
        raise KitError(f"{origin.part} has no {layout} layout; write it as ours")
    if not able:
        fitting[0].rules(origin.kwargs)  # says why not
    raise KitError(
        f"{origin.part} has several {layout} layouts; name one: {', '.join(f.name for f in able or fitting)}"
    )


def _can_say(format: Format, origin: Origin) -> bool:
    try:
        format.rules(origin.kwargs)
    except (KitError, LookupError):
        return False
    return True


def _foreign(module: nn.Module, format: Format, origin: Origin) -> dict[str, Tensor]:
    """The file's tensors; tables made anew have the weights' dtype, as a half-precision file's have."""
    own = module.state_dict()
    dtypes = {tensor.dtype for tensor in own.values() if tensor.is_floating_point()}
    tensors: dict[str, Tensor] = {}
    for step in plan(format.rules(origin.kwargs), own, inverse=True):
        made = step(own)
        if isinstance(step.rule, Ignore) and len(dtypes) == 1:
            made = {name: table.to(next(iter(dtypes))) for name, table in made.items()}
        tensors.update(made)
    return tensors


def _save_folder(folder: Path, tensors: dict[str, Tensor], format: Format, origin: Origin) -> Path:
    config: dict[str, Any] = {}
    if origin.format == format.name and origin.config:
        config = dict(origin.config)
    elif format.config is not None:
        config = format.config(origin.kwargs)
    if format.kind == "text_encoder":
        config = {"architectures": list(format.classes[:1]), **config}
        stem = "model"
    else:
        config = {"_class_name": next(iter(format.classes), None), **config}
        stem = "diffusion_pytorch_model"
    require_writable(folder, folder=True)
    save_safetensors(folder / f"{stem}.safetensors", tensors)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _require_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise KitError(f"{path}: this layout is one file; give it the suffix .safetensors")
    require_writable(path)

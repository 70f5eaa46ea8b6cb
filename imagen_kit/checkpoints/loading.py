"""Tensors of a file → a module: configured, built without memory of its own, checked, filled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imagen_kit.checkpoints import formats
from imagen_kit.checkpoints.formats import Config, Format, Shapes
from imagen_kit.checkpoints.rules import Ignore, Step, plan, to_foreign
from imagen_kit.errors import KitError, nearest
from imagen_kit.hollow import hollow_parameters

TOKENIZER = "_tokenizer"  # key under which a config names the folder of the tokenizer that was beside it
_SHOWN = 6  # faults listed of each sort; the line says how many more there are


class Source(Protocol):
    """Where tensors come from, one at a time."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        ...

    def get(self, name: str) -> Tensor:
        """The tensor, its memory shared with the file where that is possible."""
        ...

    def release(self, name: str) -> None:
        """The tensor has been copied: its pages of the file may go."""
        ...


class Tensors:
    """A state dict as a source."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "state dict"):
        self.tensors, self.name = tensors, name
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def release(self, name: str) -> None:
        pass


class Part:
    """Some tensors of a source under other names.

    Args:
        source: of all.
        names: name here → name there.
        label: for messages.
    """

    def __init__(self, source: Source, names: Mapping[str, str], label: str):
        self.source, self.names, self.name = source, names, label
        self.shapes = {name: source.shapes[full] for name, full in names.items()}

    def get(self, name: str) -> Tensor:
        return self.source.get(self.names[name])

    def release(self, name: str) -> None:
        self.source.release(self.names[name])


@dataclass(frozen=True)
class Origin:
    """How a module came from a checkpoint; loaded modules carry it as ``checkpoint_origin``.

    Attributes:
        kind, part: the part it is.
        kwargs: what its format configured: constructor arguments, and with an underscore what only the format
            needs.
        format: name of the format it was read from; None for one of ours.
        config: the community's config, where there was one.
    """

    kind: str
    part: str
    kwargs: dict[str, Any]
    format: str | None = None
    config: dict[str, Any] | None = field(default=None)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments alone."""
        return {key: value for key, value in self.kwargs.items() if not key.startswith("_")}

    def dump(self) -> str:
        """As JSON, for a file's metadata."""
        return json.dumps(vars(self))


def recognise(
    source: Source, format: str | None = None, config: Config | None = None, kind: str | None = None
) -> tuple[Part, Origin]:
    """The part of a system that ``source`` holds, under its format's names, and what it is.

    Raises:
        KitError: no tensors, no known architecture, or a size that cannot be told.
    """
    if not source.shapes:
        raise KitError(f"{source.name} holds no tensors")
    try:
        shapes = Shapes(source.shapes)
        if format is None:
            found = formats.detect(shapes, config, kind)
        else:
            found = formats.located(shapes, formats.get(format))
        label = f"{source.name} ({found.prefix}*)" if found.prefix else source.name
        view = found.format.view(shapes, found.prefix)
        return Part(source, found.format.names_in(shapes, found.prefix), label), origin_of(
            view, found.format, config
        )
    except KitError as error:
        raise KitError(f"{source.name}: {error}") from error


def origin_of(shapes: Shapes, format: Format, config: Config | None) -> Origin:
    """What a file in ``format`` with these tensors holds; KitError where its size cannot be told."""
    try:
        kwargs = format.configure(shapes, config)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, KitError):
            raise KitError(f"{format.name}: {error}") from error
        raise KitError(
            f"{format.name}: its size cannot be told from "
            f"{'its config' if config else 'its tensors'} ({type(error).__name__}: {error})"
        ) from error
    kept = {key: value for key, value in (config or {}).items() if key != TOKENIZER}
    return Origin(format.kind, format.part, kwargs, format.name, kept or None)


def hollow(origin: Origin) -> nn.Module:
    """The module with parameters on the meta device: no memory, no time spent on random numbers."""
    from importlib import import_module

    registry = import_module(f"imagen_kit.{origin.kind}s")
    name = origin.part
    with torch.random.fork_rng(devices=[]), hollow_parameters(), _quiet():
        try:
            return registry.create(name, **origin.arguments()).eval()
        except KitError:
            raise
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AssertionError) as error:
            line = " ".join(str(error).split())
            raise KitError(
                f"what the checkpoint says describes no {name} that can be built: {line}"
            ) from error


def expected(module: nn.Module, format: Format, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a file of ``module`` in ``format`` holds, by name; on the meta device but for tables."""
    meta = {key: value.detach().to("meta") for key, value in module.state_dict().items()}
    return to_foreign(format.rules(kwargs), meta)


def check(source: Source, wanted: Mapping[str, Tensor], spare: set[str], what: str) -> None:
    """KitError listing all tensors that are missing, extra or misshapen, with near names as hints."""
    shapes = source.shapes
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and name not in spare]
    faults = []
    if missing:
        lines = []
        for name in missing[:_SHOWN]:
            guess = nearest(name, extra) if len(extra) < 1000 else None
            lines.append(f"{name}" + (f" (there is {guess})" if guess else ""))
        faults.append(_listed("missing", lines, len(missing)))
    if extra:
        faults.append(_listed("extra", extra[:_SHOWN], len(extra)))
    misshapen = [
        f"{name} is {_by(shapes[name])}, should be {_by(tuple(tensor.shape))}"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if misshapen:
        faults.append(_listed("misshapen", misshapen[:_SHOWN], len(misshapen)))
    if faults:
        raise KitError(f"{source.name} is not a whole {what}: tensors " + "; ".join(faults))


def fitted(module: nn.Module, source: Source, format: Format, kwargs: Mapping[str, Any]) -> list[Step]:
    """The steps that fill ``module``, all tensors checked: present, of the right shape, and none too many.

    Raises:
        KitError: one line that lists the faults.
    """
    steps = list(plan(format.rules(kwargs), source.shapes))
    spare = {name for step in steps if isinstance(step.rule, Ignore) for name in step.sources}
    check(source, expected(module, format, kwargs), spare, f"{format.name} checkpoint")
    return steps


def fill(
    module: nn.Module,
    source: Source,
    format: Format,
    kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Give ``module`` the tensors of ``source``, after checking that they are exactly those it needs.

    Tensors that the format merely renames keep the memory they have in the source, so nothing is held twice.
    """
    filled: dict[str, Tensor] = {}
    if torch.device(device).type == "meta":
        fitted(module, source, format, kwargs)
        return module.to("meta", dtype)
    for step in fitted(module, source, format, kwargs):
        if isinstance(step.rule, Ignore):
            _check_table(source, step)
        else:
            filled.update(_moved(source, step, torch.device(device), dtype))
    _assign(module, filled, device)
    return module


# A file of ours: the module's own names, no rules.
OURS = Format("ours", "denoiser", "module", "official", lambda shapes, config: {})


def finish(
    part: Source,
    origin: Origin,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    format: Format | None = None,
) -> nn.Module:
    """The module that ``part`` holds, in evaluation mode, with its ``checkpoint_origin``.

    Args:
        part: its tensors.
        origin: what it is.
        device, dtype: of the module; see ``load``.
        format: of ``part``; the origin's by default.
    """
    module = hollow(origin)
    fill(module, part, format or formats.get(str(origin.format)), origin.kwargs, device, dtype)
    module.checkpoint_origin = origin  # type: ignore[assignment]
    return module


def _moved(source: Source, step: Step, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    given = {name: source.get(name) for name in step.sources}
    homes = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    out, copied = {}, True
    for name, tensor in step(given).items():
        kept = tensor.contiguous().to(device, dtype if tensor.is_floating_point() else None)
        copied &= kept.untyped_storage().data_ptr() not in homes
        out[name] = kept
    if copied:
        given.clear()
        for name in step.sources:
            source.release(name)
    return out


def _check_table(source: Source, step: Step) -> None:
    rule = step.rule
    if not isinstance(rule, Ignore) or rule.make is None:
        return
    table, own = source.get(step.sources[0]), rule.make()
    loose = 1e-5 if table.dtype in (torch.float32, torch.float64) else 8e-3  # half precision rounds the table
    if not torch.allclose(table.float(), own.float(), atol=loose, rtol=loose):
        raise KitError(
            f"{source.name}: {step.sources[0]} is not the table that this network computes by itself"
        )


def _assign(module: nn.Module, tensors: dict[str, Tensor], device: torch.device | str) -> None:
    trained = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(tensors, assign=True)
    for name, p in module.named_parameters(remove_duplicate=False):
        if p.is_floating_point():
            p.requires_grad_(trained[name])
    _tie(module)
    module.to(device)  # buffers that are in no file


def _tie(module: nn.Module) -> None:
    """Parameters given the same memory become one parameter again, as they were before the hollow copy."""
    seen: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            first = seen.setdefault((p.data_ptr(), tuple(p.shape)), p)
            if first is not p and p.numel() and p.device.type != "meta":
                setattr(owner, name, first)


@contextmanager
def _quiet() -> Iterator[None]:
    """Initialising what has no memory makes torch warn that it does nothing, which is meant."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _listed(sort: str, shown: list[str], number: int) -> str:
    return f"{number} {sort} ({', '.join(shown)}{f' and {number - len(shown)} more' if number > len(shown) else ''})"


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"

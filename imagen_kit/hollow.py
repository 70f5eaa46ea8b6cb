"""Modules without memory: made on the meta device, their initial values neither drawn nor kept.

torch computes random numbers for the meta device in Python, and to do so imports its compiler: more than a second
for numbers that nobody will see. Here the calls that would draw them answer at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(getattr(Tensor, name) for name in ("normal_", "uniform_", "exponential_", "bernoulli_"))
# Some of these hand themselves over whole, so that the fill inside is not seen.
_INITS = frozenset(
    getattr(nn.init, f"{name}_")
    for name in (
        *("normal", "uniform", "trunc_normal", "orthogonal", "sparse"),
        *("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"),
    )
)
_DRAWS = frozenset((torch.randn, torch.rand))
SMALL = 20_000_000  # numbers of a network that takes no time to make
T = TypeVar("T")
_parameters_only = 0  # blocks of ``hollow_parameters`` that are open


class TooLarge(Exception):
    """More numbers were asked for than ``undrawn`` allows."""


class _NothingDrawn(TorchFunctionMode):
    """Values of what will not be looked at are not drawn.

    Args:
        parameters: leave parameters as they are also where they have memory.
        limit: of the numbers in new tensors.
    """

    def __init__(self, parameters: bool = False, limit: int | None = None):
        super().__init__()
        self.parameters, self.limit, self.made = parameters, limit, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FILLS or func in _INITS:
            tensor = args[0] if args else options.get("tensor")
            if isinstance(tensor, Tensor) and (
                tensor.is_meta or (self.parameters and isinstance(tensor, nn.Parameter))
            ):
                return tensor
        elif func in _DRAWS:
            empty = torch.empty(*args, **{key: value for key, value in options.items() if key != "generator"})
            if empty.is_meta:
                return empty
        out = func(*args, **options)
        if self.limit is not None and func is torch.empty:
            self.made += out.numel()
            if self.made > self.limit:
                raise TooLarge
        return out


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Tensors made inside are on the meta device unless they are asked for elsewhere; none is drawn."""
    with torch.device("meta"), _NothingDrawn():
        yield


@contextlib.contextmanager
def hollow_parameters() -> Iterator[None]:
    """Parameters of modules made inside are on the meta device; buffers are real and keep their values."""
    global _parameters_only

    def without_memory(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    _parameters_only += 1
    try:
        with _NothingDrawn():
            yield
    finally:
        _parameters_only -= 1
        handle.remove()


@contextlib.contextmanager
def undrawn(limit: int | None = None) -> Iterator[None]:
    """Parameters made inside have memory and no values: they are about to be loaded, or of no interest.

    Args:
        limit: raise ``TooLarge`` as soon as modules have asked for more numbers than that.
    """
    with _NothingDrawn(parameters=True, limit=limit):
        yield


def sketched(make: Callable[[], T], limit: int = SMALL) -> T:
    """The module that ``make`` makes, without its initial values: of up to ``limit`` numbers on the CPU, where it
    can be tried at once; on the meta device if it is larger."""
    try:
        with undrawn(limit):
            return make()
    except TooLarge:
        with hollow():
            return make()


def is_hollow() -> bool:
    """Whether modules made now get no memory for their parameters."""
    return _parameters_only > 0 or torch.get_default_device().type == "meta"

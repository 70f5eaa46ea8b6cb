"""A stand-in for a CUDA graph on the CPU: torch's operations are written to a tape, which is played again.

As with a CUDA graph the Python of the function is not run again, every operation reads and writes the memory it did
when it was recorded, and what would have to wait for the device, or draw on the host, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FORBIDDEN = {aten._local_scalar_dense, aten.nonzero, aten.lift_fresh, aten.randn, aten.normal_, aten.rand}


class Tape:
    """Made for a device, as graphs are."""

    def __init__(self, device: torch.device):
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        with _Writing(self):
            return function()

    def replay(self) -> None:
        for operation, args, kwargs, outputs in self.operations:
            for old, new in zip(outputs, tree_leaves(operation(*args, **kwargs)), strict=True):
                if (
                    isinstance(old, Tensor) and old.data_ptr() != new.data_ptr()
                ):  # neither a view nor in place
                    old.copy_(new)


class _Writing(TorchDispatchMode):
    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"{func} is not permitted while a graph is recorded\nand more lines")
        out = func(*args, **(kwargs or {}))
        self.tape.operations.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

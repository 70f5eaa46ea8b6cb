"""torch.compile of a network's repeated blocks, or of the whole network, with the seconds that it takes.

Regional compilation compiles one block of each kind and shape and uses it for all: of DiT's 28 blocks one is
compiled. It costs a fraction of the time of the whole, and what is lost is what could be fused across blocks. Hooks
on blocks go on working, as it is their ``forward`` that is compiled.
"""

from __future__ import annotations

import time
from types import MethodType
from typing import Any

import torch
from torch import nn

from imagen_kit.errors import KitError
from imagen_kit.performance.regions import blocks

#: Times and shapes that each kind of block may be compiled for: guidance that comes and goes, a last small batch.
VARIANTS = 4


class _Clock:
    """Seconds that this process has spent in torch.compile, counted by the compiler's own callbacks."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def listen(self) -> None:
        from torch._dynamo.callback import callback_handler

        if self._start not in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets all of them
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


_clock = _Clock()


class Region:
    """A module's forward, compiled when it is first called; ``seconds`` is what that has taken so far."""

    def __init__(self, module: nn.Module):
        self.module, self.seconds = module, 0.0
        self._run = torch.compile(MethodType(type(module).forward, module), dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = _clock.seconds
        try:
            return self._run(*args, **kwargs)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise KitError(f"cannot compile {type(self.module).__name__} here: {_reason(error)}") from error
        finally:
            self.seconds += _clock.seconds - before

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """Of the copied module: a copy of a network must not run with the weights of the original."""
        return Region(memo.get(id(self.module), self.module))


def compile_blocks(module: nn.Module) -> int:
    """Compile the repeated blocks of a network in place; how many there are.

    Raises:
        KitError: a network without repeated blocks; when called, a machine that cannot compile.
    """
    found = blocks(module)
    _compile(found)
    return len(found)


def compile_whole(module: nn.Module) -> None:
    """Compile a network as one graph, in place; KitError when called where the machine cannot."""
    _compile([module])


def compile_seconds(module: nn.Module) -> float:
    """Seconds that compiling a network or its blocks has taken so far."""
    return sum((region.seconds for region in _regions(module)), 0.0)


def uncompile(module: nn.Module) -> None:
    """Let a network and its blocks run as they were written."""
    for region in _regions(module):
        del region.module.forward


def _regions(module: nn.Module) -> list[Region]:
    found = [part.__dict__.get("forward") for part in module.modules()]
    return [each for each in found if isinstance(each, Region)]


def _compile(modules: list[nn.Module]) -> None:
    import torch._dynamo.config as dynamo

    _clock.listen()
    # Blocks of one class are one function to the compiler, which gives up after few shapes: U-Nets have many.
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * len(modules))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * VARIANTS * len(modules))
    for module in modules:
        module.forward = Region(module)  # type: ignore[assignment,method-assign]


def _reason(error: BaseException) -> str:
    """The first line that says what is wrong, of the innermost cause."""
    cause = error.__cause__ or getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = next((line for line in lines if "compiler" in line.lower()), lines[0] if lines else "unknown")
    return f"{text} (compile: off runs without)"

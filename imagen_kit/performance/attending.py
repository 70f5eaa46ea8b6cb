"""A stage's own choice of attention kernel: active while its networks compute, and only then."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from imagen_kit.attention import use_backend


def attend_by(module: nn.Module, backend: str | None) -> None:
    """Make every call of ``module`` use an attention backend; None leaves the choice to the process again.

    The choice is made before the network's forward and undone after it, also where that fails, so compiled blocks
    see it as they see ``use_backend``: they compile once for each backend. It holds for all threads meanwhile.

    Raises:
        KitError: a backend that is unknown or not to be had here.
    """
    for handle in module.__dict__.pop("attention_hooks", ()):
        handle.remove()
    if backend is None:
        return
    with use_backend(backend):  # told now rather than at the first picture
        pass
    switch = _Switch(backend)
    module.attention_hooks = [  # type: ignore[assignment]
        module.register_forward_pre_hook(switch.enter),
        module.register_forward_hook(switch.leave, always_call=True),
    ]


class _Switch:
    """The hooks of one network."""

    def __init__(self, backend: str):
        self.backend = backend
        self._inside: list[AbstractContextManager[None]] = []

    def enter(self, module: nn.Module, inputs: Any) -> None:
        chosen = use_backend(self.backend)
        chosen.__enter__()
        self._inside.append(chosen)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop().__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Switch:
        return _Switch(self.backend)

"""A CUDA device that computes nothing, on machines without one: tensors there have shapes and no numbers.

Inside of ``device()`` what is said to be on ``cuda`` is a fake tensor of torch's, and everything else a real one of
the host. An operation on tensors of both is an error, as on a GPU. What such a machine would have to wait for, and
what it would have to be sent, is written down with the line of code that asked for it:

    reads     the host reads a number of the device: it waits until all work there is done
    sends     the host sends memory of its own that is not pinned, or waits for it to be sent
    scalars   a tensor of the host that holds one number takes part in the device's arithmetic (its value enters as the
              kernel is launched: nothing waits, but a recorded graph keeps the value)

``torch.cuda``'s streams, events, graphs and debug mode are stand-ins that keep to CUDA's rules as far as the host
could break them: what waits cannot be recorded, and a recording that met such a thing cannot be ended.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import imagen_kit
from imagen_kit import loops
from imagen_kit.samplers import triton_sum

PACKAGE = f"{Path(imagen_kit.__file__).parent}/"
aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
#: Operations of which the size of the answer, or the answer itself, depends on numbers.
READERS = {
    aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.unique_dim, aten.bincount, aten.histc, aten._linalg_check_errors,
}  # fmt: skip
PLACED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SEED = 0xC0DA
WAITS = "called a synchronizing CUDA operation"
INTRODUCTION = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
)


class Device(TorchDispatchMode):
    """See the module.

    Attributes:
        reads, sends, scalars: lines of code, each as often as it did so.
        graphs: recordings that came to their end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode()
        self.pinned: set[int] = set()
        self.debug, self.introduced = 0, False
        self.capturing: Graph | None = None
        self.broken = False
        self.graphs: list[Graph] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was written down."""
        self.reads: list[str] = []
        self.sends: list[str] = []
        self.scalars: list[str] = []

    @property
    def waits(self) -> list[str]:
        """All that the host waited for."""
        return [*self.reads, *self.sends]

    def __enter__(self) -> Device:
        self.fakes.__enter__()  # below this one: while it is there nothing asks for the driver
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.fakes.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, FakeTensor) for tensor in given)
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if not there and not to_cuda:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is aten.copy_:
            return self._copy(func, args)
        if packet is aten._to_copy:
            return self._moved(func, args[0], kwargs, to_cuda)
        if packet in READERS or (packet in PLACED and _by_truth(args[1])):
            return self._read(func, given[0])
        if torch.Tag.nondeterministic_seeded in func.tags:
            func, kwargs = self._drawing(func, kwargs)
        return self._there(func, args, kwargs, given)

    def _there(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """On the device."""
        for tensor in given:
            if isinstance(tensor, FakeTensor):
                continue
            if tensor.ndim:
                both = f"tensors on cuda and one {tuple(tensor.shape)} on {tensor.device}"
                raise RuntimeError(f"{func} of {both}: {_line()}")
            self.scalars.append(f"{func} at {_line()}")

        def convert(tensor: Tensor) -> Tensor:
            return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor)

        return func(*tree_map_only(Tensor, convert, args), **tree_map_only(Tensor, convert, kwargs))

    def _copy(self, func: Any, args: Any) -> Tensor:
        target, source = args[0], args[1]
        if isinstance(target, FakeTensor) and isinstance(source, FakeTensor):
            return self._there(func, args, {}, [])
        if isinstance(target, FakeTensor):
            if target.shape != torch.broadcast_shapes(target.shape, source.shape):
                raise RuntimeError(
                    f"{tuple(source.shape)} does not fit into {tuple(target.shape)}: {_line()}"
                )
            self._sent(source, len(args) > 2 and bool(args[2]))
        else:
            self._waited(self.reads, str(func))
        return target

    def _moved(self, func: Any, source: Tensor, kwargs: Any, to_cuda: bool) -> Tensor:
        if not isinstance(source, FakeTensor):
            self._sent(source, bool(kwargs.get("non_blocking")))
            wanted, dtype = kwargs.get("memory_format") or torch.preserve_format, kwargs.get("dtype")
            with unset_fake_temporarily():
                like = torch.empty_like(source, device="meta", dtype=dtype, memory_format=wanted)
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")
        if kwargs.get("device") is not None and not to_cuda:
            self._waited(self.reads, str(func))
            with unset_fake_temporarily():
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return self._there(func, (source,), kwargs, [])

    def _read(self, func: Any, tensor: Tensor) -> Any:
        self._waited(self.reads, str(func))
        if func.overloadpacket is aten._local_scalar_dense:
            return True if tensor.dtype is torch.bool else 1
        if func.overloadpacket is aten.equal:
            return False
        raise RuntimeError(f"the size of what {func} answers depends on numbers of the device: {_line()}")

    def _drawing(self, func: Any, kwargs: Any) -> tuple[Any, Any]:
        """An operation that draws, without its generator."""
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() != SEED:
            raise RuntimeError(f"{func} on cuda with a generator of {generator.device}: {_line()}")
        if self.capturing is not None and generator is not None and not self.capturing.generators:
            raise RuntimeError(f"the generator of {func} is not registered with the graph: {_line()}")
        name = {"generator": "default", "low_generator": "low"}.get(func._overloadname, func._overloadname)
        kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
        return getattr(func.overloadpacket, name), kwargs

    def _sent(self, source: Tensor, without_waiting: bool) -> None:
        if not (without_waiting and source.data_ptr() in self.pinned):
            self._waited(self.sends, f"{tuple(source.shape)} {source.dtype}")
        elif self.capturing is not None:  # the host's memory would be read anew at every replay
            self.broken = True
            raise RuntimeError(f"memory of the host is sent amid a recording: {_line()}")

    def _waited(self, where: list[str], what: str) -> None:
        where.append(f"{what} at {_line()}")
        if self.capturing is not None:
            self.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {where[-1]}")
        if self.debug == 2:
            raise RuntimeError(f"{WAITS}: {where[-1]}")
        if self.debug == 1:
            warnings.warn(WAITS, stacklevel=2)

    def pin(self, tensor: Tensor) -> Tensor:
        """``Tensor.pin_memory`` where there is no driver to ask."""
        with unset_fake_temporarily():
            copied = tensor.clone()
        self.pinned.add(copied.data_ptr())
        self._kept = [*getattr(self, "_kept", []), copied]  # its address is nobody else's
        return copied

    def set_debug(self, mode: str | int) -> None:
        """``torch.cuda.set_sync_debug_mode``, which introduces itself, once in a process."""
        self.debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[arg-type,assignment]
        if not self.introduced:
            self.introduced = True
            warnings.warn(INTRODUCTION, stacklevel=2)


class Generator(torch.Generator):
    """A generator that says it is of ``cuda``; operations, which are given its inner part, know it by its seed."""

    def __init__(self) -> None:
        super().__init__()
        self.manual_seed(SEED)

    @property
    def device(self) -> torch.device:
        return CUDA


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.replays, self.recorded = 0, False

    def register_generator_state(self, generator: torch.Generator) -> None:
        assert generator.device.type == "cuda"
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.recorded
        self.replays += 1


class Stream:
    """``torch.cuda.Stream`` and ``torch.cuda.Event``: everything happens in the order it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: self.calls.append(name)


class _Launches:
    """Stands in for the Triton kernel of a row's sum: what it is launched with must be what it takes."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(n, int) and n > 0 for n in grid)
        return self._launch

    def _launch(self, out: Tensor, *given: Any, K: int, B: int) -> None:
        half = (len(given) - 1) // 2
        pointers, numbers, size = given[:half], given[half:-1], given[-1]
        for tensor in (out, *pointers):
            assert isinstance(tensor, FakeTensor)
            assert (tensor.is_cuda, tensor.is_contiguous(), tensor.numel()) == (True, True, size)
        assert all(type(number) is float for number in numbers)
        assert len(pointers) == len(numbers) >= K


@contextlib.contextmanager
def device(monkeypatch: Any) -> Iterator[Device]:
    """A block in which ``cuda`` can be named; what the driver would be asked for is answered here."""
    made, stream = Device(), Stream()

    @contextlib.contextmanager
    def recording(graph: Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert made.capturing is None
        made.capturing, made.broken = graph, False
        try:
            yield
        finally:
            made.capturing = None
            if made.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        graph.recorded = True
        made.graphs.append(graph)

    answers: dict[str, Any] = {
        "device": lambda index: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "current_device": lambda: 0,
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "Event": Stream,
        "CUDAGraph": Graph,
        "graph": recording,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: made.capturing is not None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_sync_debug_mode": lambda: made.debug,
        "set_sync_debug_mode": made.set_debug,
    }
    with monkeypatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(Tensor, "pin_memory", lambda tensor, device=None: made.pin(tensor))
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(loops, "_address", id)
        patch.setattr(triton_sum, "available", lambda: True)
        patch.setattr(triton_sum, "_kernel", lambda: _Launches())
        with made:
            yield made


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` for parameters that come to be fake: torch's own moves them but once."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, held in module._parameters.items():
        if held is not None:
            with torch.no_grad():
                fresh = fn(held)
            module._parameters[name] = nn.Parameter(fresh, held.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else fn(buffer)
    return module


def _by_truth(places: Any) -> bool:
    """Whether places are told by booleans: how many are true must be read."""
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in places)


def _line() -> str:
    """The innermost line of the kit's that asked, or of what is neither torch nor this file."""
    frame, found = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)}:{frame.f_lineno}"
        if not found and "/torch/" not in name and name != __file__:
            found = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return found

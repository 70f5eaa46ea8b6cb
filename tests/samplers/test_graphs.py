"""A run as one function, replayed from a CUDA graph where there is a CUDA device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.graphs import CudaGraph, Recorded, graphed, waiting

SCHEDULE = schedules.create("scaled_linear")


def test_on_the_cpu_the_tableau_is_simply_run() -> None:
    sampler, x = samplers.create("ddpm"), torch.randn(2, 3, 4, 4)
    tableau = sampler.tableau(SCHEDULE, 5)
    made = graphed(lambda x, t: x * 0.5, tableau, x, torch.Generator().manual_seed(0))
    expected = sampler.sample(
        lambda x, t: x * 0.5, x, SCHEDULE, 5, generator=torch.Generator().manual_seed(0)
    )
    first, second = made(x), made(x)
    assert torch.equal(first, expected)
    assert not torch.equal(first, second)  # the generator goes on
    with pytest.raises(
        KitError, match=r"made for x of \(2, 3, 4, 4\) torch\.float32 on cpu, not \(1, 3, 4, 4\)"
    ):
        made(x[:1])


class Again:
    """A recorder for the CPU: runs the function again, into the same result."""

    def __init__(self, device: torch.device):
        self.replays = 0

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        self.function, self.result = function, function()
        return self.result

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.function())


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_3m_sde"])
@torch.no_grad()
def test_noise_is_drawn_before_a_replay_in_the_order_of_the_run(name: str) -> None:
    sampler, x = samplers.create(name), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tableau, recorders = sampler.tableau(SCHEDULE, 5), []

    def recorder(device: torch.device) -> Again:
        recorders.append(Again(device))
        return recorders[-1]

    def drawing(seed: int) -> Callable[[], Tensor]:
        source = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=source)

    made = graphed(lambda x, t: x * 0.5, tableau, x, noise=drawing(1), graph=recorder)
    source = drawing(1)
    for start in (x, 2 * x):  # the second goes on where the first ended, as plain runs do
        expected = sampler.sample(lambda x, t: x * 0.5, start, SCHEDULE, 5, noise=source)
        assert torch.equal(made(start), expected)
    (only,) = recorders
    assert only.replays == 2


def test_a_recorded_function_answers_in_a_tensor_of_its_own() -> None:
    made = Recorded(lambda a, b: a + 2 * b, [torch.zeros(2), torch.zeros(2)], Again(torch.device("cpu")))
    first = made(torch.ones(2), torch.ones(2))
    second = made(torch.ones(2), torch.zeros(2))
    assert (first.tolist(), second.tolist()) == ([3.0, 3.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="shorter"):
        made(torch.ones(2))


def test_noise_comes_from_one_source() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(KitError, match="give either noise or a generator, not both"):
        graphed(
            *(lambda x, t: x, samplers.create("ddpm").tableau(SCHEDULE, 4), x, torch.Generator()),
            noise=lambda: x,
        )


class Api:
    """The calls of torch that a recording makes, with the faults of its releases.

    Args:
        end_fails: the recording cannot be ended, and its stream stays the current one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_fails: bool):
        self.calls: list[str] = []
        self.end_fails, self.under_way, self.stream = end_fails, False, "usual"
        for name in (
            "current_stream",
            "set_stream",
            "device",
            "graph",
            "graph_pool_handle",
            "current_device",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch, "empty", lambda size, device: torch.zeros(size))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name.removeprefix("_cuda_")), raising=False)

    def current_stream(self, device: object) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 7)

    def current_device(self) -> int:
        return 3

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object = None, capture_error_mode: str = "global") -> Iterator[None]:
        self.calls.append(f"record {pool}")
        self.stream, fails = "recording", self.end_fails
        self.under_way = True
        try:
            yield
        finally:
            if fails:
                self.end_fails = False
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream, self.under_way = "usual", False

    def endAllocateToPool(self, device: int, pool: tuple[int, int]) -> None:
        if not self.under_way:
            raise RuntimeError("not currently recording to mempool_id")
        self.under_way = False
        self.calls.append(f"end {device} {pool}")

    def releasePool(self, device: int, pool: tuple[int, int]) -> None:
        self.calls.append(f"release {device} {pool}")


def refused() -> Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_cannot_be_ended_leaves_the_device_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(monkeypatch, end_fails=True)
    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$") as told:
        CudaGraph(torch.device("cuda")).record(refused)
    assert told.value.__suppress_context__
    assert (api.stream, api.under_way) == ("usual", False)
    # the allocator's end, its memory's release, and a recording that ends well, for torch's own generator
    assert api.calls == ["record (0, 7)", "end 3 (0, 7)", "release 3 (0, 7)", "record None"]


def test_what_a_function_raises_of_its_own_is_not_mended_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording ended: its memory is its own to give back."""
    api = Api(monkeypatch, end_fails=False)
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraph(torch.device("cuda", 1), pool=(0, 9)).record(refused)
    assert api.calls == ["record (0, 9)", "record None"]
    kept = torch.ones(2)
    assert CudaGraph(torch.device("cuda", 1), pool=(0, 9)).record(lambda: kept) is kept


def test_waits_are_what_cuda_says_and_other_warnings_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []

    def debug(mode: object) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode does not detect all synchronizing operations", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", debug)
    with warnings.catch_warnings(record=True) as through:
        warnings.simplefilter("always")
        with waiting(torch.device("cuda")) as waits:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("another matter", stacklevel=1)
    assert [line.rpartition("/")[2].partition(":")[0] for line in waits] == ["test_graphs.py"] * 2
    assert "another matter" in [str(warning.message) for warning in through]
    assert modes == ["warn", 0]
    with waiting(torch.device("cpu")) as waits:
        pass
    assert waits == []


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "unipc", "heun"])
def test_a_graph_gives_the_same_sample(name: str) -> None:
    network = torch.nn.Conv2d(3, 3, 3, padding=1).cuda()
    denoise = lambda x, t: network(x) / (1 + t)  # noqa: E731
    x = torch.randn(2, 3, 16, 16, device="cuda")
    sampler = samplers.create(name)
    with torch.no_grad():
        expected = sampler.sample(denoise, x, SCHEDULE, 6)
        made = graphed(denoise, sampler.tableau(SCHEDULE, 6), torch.empty_like(x))
        # the same kernels on the same numbers
        torch.testing.assert_close(made(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            made(2 * x), sampler.sample(denoise, 2 * x, SCHEDULE, 6), rtol=1e-6, atol=1e-6
        )


@pytest.mark.gpu
@needs_cuda
def test_every_replay_draws_new_noise() -> None:
    x = torch.zeros(1, 4, 8, 8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    made = graphed(lambda x, t: x * 0.5, samplers.create("ddpm").tableau(SCHEDULE, 4), x, generator)
    assert not torch.equal(made(x), made(x))
    sources = [torch.Generator().manual_seed(5) for _ in range(2)]  # of the host, as pipelines draw
    drawn = [lambda source=source: torch.randn(1, 4, 8, 8, generator=source).cuda() for source in sources]
    denoise, sampler = lambda x, t: x * 0.5, samplers.create("ddpm")
    made = graphed(denoise, sampler.tableau(SCHEDULE, 4), x, noise=drawn[0])
    expected = sampler.sample(denoise, x, SCHEDULE, 4, noise=drawn[1])
    torch.testing.assert_close(made(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(KitError, match="give generators of the device 'cuda'"):
        graphed(lambda x, t: x, samplers.create("ddpm").tableau(SCHEDULE, 4), x, torch.Generator())

"""What a GPU must agree on: recorded loops with plain ones, precisions, offloaded parts with resident ones, no waits.

Each check is one function of the place where it runs; on the CPU (a tape in place of a graph) or on a device that
computes nothing it goes the same way, so that a GPU's first run of it is not the first run of its code.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_cuda
import pytest
import torch
from published_small import SMALL
from tape_graph import Tape
from torch import Tensor

from imagen_kit import denoisers, recipe, samplers, schedules
from imagen_kit.bench import energy
from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.measure import NO_MEMORY, Measurer
from imagen_kit.bench.subject import OURS, Case, Subject
from imagen_kit.conditioning import Cond
from imagen_kit.loops import Loops
from imagen_kit.performance import Performance
from imagen_kit.pipeline import Pipeline
from imagen_kit.samplers import arena
from imagen_kit.samplers.graphs import CudaGraph
from imagen_kit.stage import Stage

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = pytest.param("cuda", marks=ON_GPU)
CPU_OR_CUDA = pytest.mark.parametrize("place", ["cpu", CUDA])
#: A transformer of every kind, and the U-Nets of three projects.
FAMILIES = ["tiny", *(name for name in SMALL if name not in ("dit-xl-2-512", "adm-256"))]


@pytest.fixture(autouse=True)
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float32 is float32 in convolutions, too, and the tape sees every sum."""
    monkeypatch.setattr(arena, "fits", lambda plan, x: False)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def schedule_of(sampler: Any) -> Any:
    for name in ("scaled_linear", "flow", "edm"):
        with contextlib.suppress(ValueError):
            sampler.points(schedules.create(name), 4)
            return schedules.create(name)
    raise AssertionError(sampler.name)


def build(name: str, place: str, *more: str, dtype: str = "fp32") -> Pipeline:
    """A recipe in small; the same weights wherever and however often it is built."""
    torch.manual_seed(0)
    given = [] if name == "tiny" else ["stages.0.weights=random", *SMALL[name]]
    pipeline = recipe.load(name, [*given, "stages.0.sampler.steps=2", *more]).build(
        "cpu" if place == "cpu" else "cuda", dtype
    )
    generator = torch.Generator().manual_seed(1)
    for stage in pipeline.stages:
        if not more and place != "fake":
            shaken(stage.denoiser, generator)
    return pipeline


@torch.no_grad()
def shaken(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Layers that start at zero would hide what comes before them."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(0.1 * max(1, parameter[0].numel() if parameter.ndim else 1) ** -0.5 * noise)


def texts(pipeline: Pipeline) -> list[str]:
    return ["1", "2"] if hasattr(pipeline.text_encoder, "classes") else ["ab", "cde f"]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).square().mean().sqrt() / want.std()).item()


@CPU_OR_CUDA
@pytest.mark.parametrize("name", [name for name in samplers.names() if not samplers.create(name).decides])
@torch.no_grad()
def test_a_recorded_loop_is_the_plain_one(name: str, place: str) -> None:
    """Every solver, with guidance: the same kernels on the same numbers."""
    torch.manual_seed(0)
    network = denoisers.create("dit", width=32, depth=1, heads=2, context_dim=8).eval()
    shaken(network, torch.Generator().manual_seed(0))
    sampler = samplers.create(name)
    stage = Stage("base", network.to(place), schedule_of(sampler), "v", sampler, 8, 4, (2.0,))
    recording = replace(stage, performance=Performance(graph=True))
    conds = {key: Cond(tokens=torch.randn(2, 3, 8, device=place)) for key in ("cond", "uncond")}
    loops = Loops(Tape if place == "cpu" else None)
    for turn in range(3):
        x = torch.randn(2, 3, 8, 8).to(place)
        plain, recorded = (
            loops.sample(told, x, conds, drawing(turn, place), [], lambda: None)
            for told in (stage, recording)
        )
        torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=1e-5)
    assert loops._loops[0].recorded is not None, loops._loops[0].obstacle


def drawing(seed: int, place: str) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        noise = torch.randn(2, 3, 8, 8, generator=generator)
        return noise if place == "cpu" else noise.pin_memory().to(place, non_blocking=True)

    return draw


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tiny", "cpu"),
        ("sd3-medium", "cpu"),
        *(pytest.param(name, "cuda", marks=ON_GPU) for name in FAMILIES),
    ],
)
def test_bfloat16_draws_nearly_the_picture_of_float32(name: str, place: str) -> None:
    exact = build(name, place)
    want = exact(texts(exact), seed=3).tensor
    rounded = build(name, place, dtype="bf16")
    # bfloat16 keeps 8 bits: 2^-8 a layer, some ten layers deep, of which a picture shows a part
    assert relative(rounded(texts(rounded), seed=3).tensor, want) < 3e-2
    if place == "cuda":  # and a GPU the CPU's, but for the order in which kernels add
        here = build(name, "cpu")
        assert relative(want.cpu(), here(texts(here), seed=3).tensor.cpu()) < 1e-2


@pytest.mark.parametrize(
    ("name", "place"),
    [("tiny", "fake"), *(pytest.param(name, "cuda", marks=ON_GPU) for name in FAMILIES)],
)
def test_cuda_itself_sees_no_wait_in_a_loop(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its debug mode raises at the first."""
    with fake_cuda.device(monkeypatch) if place == "fake" else contextlib.nullcontext():
        pipeline = build(name, place, dtype="bf16")
        pipeline(texts(pipeline))  # libraries may wait at their first call
        plain, seen = Loops.sample, []

        def strictly(*args: Any, **more: Any) -> Tensor:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return plain(*args, **more)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                seen.append(args[1].name)

        monkeypatch.setattr(Loops, "sample", strictly)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode's introduction
            pipeline(texts(pipeline))
    assert seen == [stage.name for stage in pipeline.stages]


@pytest.mark.parametrize("place", [CUDA])
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_families_draw_the_pictures_of_plain_ones(name: str, place: str) -> None:
    plain, recorded = build(name, place, dtype="bf16"), build(name, place, dtype="bf16")
    recorded.stages = [
        replace(stage, performance=replace(stage.performance, graph=True)) for stage in recorded.stages
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            got, want = (made(texts(made), seed=seed).tensor for made in (recorded, plain))
            # the same kernels, but for algorithms that cuDNN may choose anew, in 8 bits
            assert relative(got, want) < 1e-2
    assert all(loop.recorded is not None for loop in recorded.loops._loops)


@pytest.mark.parametrize("place", [CUDA])
@pytest.mark.parametrize("mode", ["model", "layers"])
@pytest.mark.parametrize("name", ["sd15", "sd3-medium", "flux-dev"])
def test_offloaded_parts_draw_the_pictures_of_resident_ones(name: str, mode: str, place: str) -> None:
    resident = build(name, place, "offload=none")
    want = resident(texts(resident), seed=1).tensor
    offloaded = build(name, place, f"offload={mode}")
    for _ in range(2):
        assert relative(offloaded(texts(offloaded), seed=1).tensor, want) < 1e-5
    assert not any(p.is_cuda for stage in offloaded.stages for p in stage.denoiser.parameters())


@pytest.mark.parametrize("place", [CUDA])
def test_a_recording_that_failed_leaves_a_device_that_works(place: str) -> None:
    x = torch.ones(4, device=place)
    with pytest.raises(RuntimeError):
        CudaGraph(x.device).record(lambda: x * x.sum().item())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(8, device=place).isfinite().all()  # torch's own generator draws
    graph = CudaGraph(x.device)
    out = graph.record(lambda: x * 3)
    x.fill_(2)
    graph.replay()
    assert out.tolist() == [6.0] * 4


class Greedy(Subject):
    """Wants more memory than there is."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self) -> Tensor:
        return torch.empty(2**50, dtype=torch.uint8, device=self.device)


@CPU_OR_CUDA
def test_memory_that_does_not_suffice_is_a_row(place: str) -> None:
    device = torch.device(place)
    measure = Measurer(
        lambda case, device: {OURS: Greedy(device)}, device, Protocol(least=2, most=2, seconds=0)
    )
    row = measure(Case("denoiser", "dit", {}))
    assert (row["status"], row["entries"][OURS]["status"]) == (NO_MEMORY, NO_MEMORY)


@pytest.mark.parametrize("place", [CUDA])
def test_a_gpu_tells_its_energy(place: str) -> None:
    device = torch.device(place)
    meter = energy.find_meter(device)
    assert meter is not None
    x = torch.randn(4096, 4096, device=device)
    used = energy.joules(lambda: x @ x, device, 0.5, meter)
    assert used is not None
    assert 1e-3 < used < 1e3  # 0.14 TFLOP at some hundred watts

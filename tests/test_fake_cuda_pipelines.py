"""Whole pipelines on a device that is not there: nothing of a sampling loop waits for it, and all of it is on it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import fake_cuda
import pytest
import torch
from published_small import SMALL

from imagen_kit import recipe
from imagen_kit.loops import Loops
from imagen_kit.performance import streaming

#: Outside of a loop a stage's pictures, and what a text encoder makes, are looked at once: are they finite?
CHECKS = ("pipeline.py", "text_encoders/")


def small(name: str, *more: str) -> recipe.Recipe:
    """A recipe with random weights and two steps a stage."""
    if name == "tiny":
        return recipe.load("tiny", ["stages.0.sampler.steps=2", *more])
    return recipe.load(name, ["stages.0.weights=random", "stages.0.sampler.steps=2", *SMALL[name], *more])


def prompts(system: recipe.Recipe) -> list[str]:
    return ["1", "2"] if system.spec.labels is not None else ["ab", "cde f"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("tiny", "fp32"), *((name, "bf16") for name in SMALL if name != "dit-xl-2-512")]
)
def test_loops_are_recorded_and_wait_for_nothing(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain loop in which CUDA's debug mode sees no wait, then a recording, which a wait would break."""
    system = small(name)
    with fake_cuda.device(monkeypatch) as gpu, warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(monkeypatch)
        pipeline = system.build("cuda", dtype)
        pipeline.stages = [
            replace(stage, performance=replace(stage.performance, graph=True)) for stage in pipeline.stages
        ]
        gpu.clear()
        for turn in range(2):
            gpu.clear()
            got = pipeline(prompts(system), seed=turn).tensor
            assert got.shape == (2, 3, pipeline.stages[-1].size, pipeline.stages[-1].size)
            assert all(line.split(" at ")[1].startswith(CHECKS) for line in gpu.reads), gpu.reads
            assert len([line for line in gpu.reads if "pipeline.py" in line]) == len(pipeline.stages)
        assert gpu.scalars == []
    loops = pipeline.loops._loops
    assert [(loop.looks, loop.obstacle) for loop in loops] == [(1, None)] * len(pipeline.stages)
    assert all(loop.recorded is not None for loop in loops)
    assert [graph.replays for graph in gpu.graphs] == [1] * len(pipeline.stages)


def gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes need a driver; gradients are of the shapes of what they are of."""
    monkeypatch.setattr(torch.autograd, "grad", lambda out, of, *_, **__: tuple(torch.zeros_like(x) for x in of)
                        if isinstance(of, tuple | list) else (torch.zeros_like(of),))  # fmt: skip


def test_a_loop_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge judges: a network that looks at its numbers is found by the debug mode, and not recorded."""
    system = small("tiny")
    with fake_cuda.device(monkeypatch) as gpu:
        pipeline = system.build("cuda")
        stage = replace(pipeline.stages[0], performance=replace(pipeline.stages[0].performance, graph=True))
        pipeline.stages = [stage]
        stage.denoiser.register_forward_hook(lambda module, args, out: out * out.sum().item())
        pipeline("ab")
        with pytest.warns(UserWarning, match=r"'base' runs without a graph: it waits for the device"):
            pipeline("ab")
        pipeline("ab")
        assert gpu.graphs == []
        gpu.debug = 2
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            Loops().sample(
                replace(stage, performance=replace(stage.performance, graph=False)), *inputs(pipeline)
            )


def inputs(pipeline: Any) -> tuple[Any, ...]:
    stage = pipeline.stages[0]
    x = torch.zeros(1, 3, stage.size, stage.size, device="cuda")
    owner = torch.zeros(1, dtype=torch.long, device="cuda")
    conds = pipeline._encode(["ab"], {"uncond": [""]}, [stage], owner)
    return x, conds[0], lambda: torch.zeros_like(x), [], lambda: None


class AtOnce:
    """A pool of one thread that is this one."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Any, *args: Any) -> Any:
        function(*args)
        return self

    def result(self) -> None: ...

    def shutdown(self) -> None: ...


@pytest.mark.parametrize(("name", "mode"), [("tiny", "model"), ("pixart-alpha", "layers")])
def test_offloaded_parts_come_out_of_pinned_memory(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "ThreadPoolExecutor", AtOnce)
    system = small(name, f"offload={mode}")
    with fake_cuda.device(monkeypatch) as gpu:
        empty = torch.empty

        def allocate(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            made = empty(*size, **more)
            return gpu.pin(made) if pin_memory else made

        monkeypatch.setattr(torch, "empty", allocate)
        pipeline = system.build("cuda")
        for _ in range(2):
            gpu.clear()
            pipeline(prompts(system))
            waited = [line for line in gpu.sends if "performance/" in line]
            assert waited == []
            assert not any(p.is_cuda for stage in pipeline.stages for p in stage.denoiser.parameters())
            assert not any(p.is_cuda for p in pipeline.text_encoder.parameters())

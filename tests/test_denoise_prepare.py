"""When a run asks a network to prepare its conditioning, and what a prepared conditioning is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imagen_kit import denoise_fn, samplers, schedules
from imagen_kit.conditioning import Cond

FLOW = schedules.create("flow")
EULER = samplers.create("euler")
X = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Reader:
    """Answers x plus the mean of its text, which ``prepare`` takes beforehand; counts both ways."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.read = 0

    def prepare(self, cond: Cond) -> Cond:
        self.prepared.append(len(cond.tokens))
        return replace(cond, memory=(self._mean(cond),))

    def _mean(self, cond: Cond) -> Tensor:
        return cond.tokens.flatten(1).mean(1)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.read += cond.memory is None
        mean = self._mean(cond) if cond.memory is None else cond.memory[0]
        return 0.5 * x + mean.reshape(-1, 1, 1, 1)


def text(seed: int, batch: int = 2) -> Cond:
    return Cond(tokens=torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def test_a_conditioning_is_prepared_once_a_run_for_every_set_of_branches():
    network = Reader()
    guidance = {"name": "cfg", "scale": 2.0, "interval": [0.5, 2.0]}
    denoise = denoise_fn(network, FLOW, "flow", cond=text(1), uncond=text(2), guidance=guidance)
    EULER.sample(denoise, X, FLOW, 8)
    assert sorted(network.prepared) == [2, 4]  # cond alone outside the interval, both inside
    EULER.sample(denoise, X, FLOW, 8)
    assert sorted(network.prepared) == [2, 2, 4, 4]
    assert network.read == 0


@torch.no_grad()
def test_every_network_prepares_for_itself():
    network, weak = Reader(), Reader()
    guidance = [2.0, {"name": "autoguidance", "scale": 1.5}]
    conds = {"cond": text(1), "uncond": text(2)}
    denoise = denoise_fn(network, FLOW, "flow", **conds, guidance=guidance, networks={"weak": weak})
    sample = EULER.sample(denoise, X, FLOW, 3)
    assert (network.prepared, weak.prepared) == ([4], [2])
    plain = denoise_fn(
        network, FLOW, "flow", **conds, guidance=guidance, networks={"weak": weak}, remember_text=False
    )
    assert torch.equal(EULER.sample(plain, X, FLOW, 3), sample)
    assert (network.prepared, weak.prepared) == ([4], [2])


def test_nothing_is_remembered_outside_a_run_or_where_gradients_are_recorded():
    network = Reader()
    denoise = denoise_fn(network, FLOW, "flow", cond=text(1))
    with torch.no_grad():
        denoise(X, 0.5)
    EULER.sample(denoise, X, FLOW, 2)
    assert (network.prepared, network.read) == ([], 3)
    run = denoise.begin(times=[1.0, 0.5, 0.0])
    with torch.no_grad():
        run(X, 1.0)
    run(X, 0.5)  # the memory made without gradients is not taken for one with
    assert (network.prepared, network.read) == ([2], 4)


@torch.no_grad()
def test_a_plain_tensor_is_never_prepared():
    class Network(torch.nn.Module):
        def prepare(self, cond: Cond) -> Cond:
            raise AssertionError("asked to prepare a tensor")

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x * cond.reshape(-1, 1, 1, 1)

    denoise = denoise_fn(Network(), FLOW, "flow", cond=torch.ones(2))
    assert EULER.sample(denoise, X, FLOW, 2).shape == X.shape


def test_a_memory_goes_where_its_conditioning_goes():
    memory = (torch.arange(6.0).reshape(3, 2), torch.tensor([[True], [False], [True]]))
    cond = replace(text(1, 3), memory=memory)
    assert torch.equal(cond[1:].memory[0], memory[0][1:])
    assert torch.equal(cond.map(lambda v: v * 2).memory[0], 2 * memory[0])
    half = cond.to(dtype=torch.float16)
    assert [value.dtype for value in half.memory] == [torch.float16, torch.bool]
    assert cond.to("cpu").batch == 3
    joined = Cond.cat([cond, cond[:1]])
    assert torch.equal(joined.memory[0], torch.cat([memory[0], memory[0][:1]]))
    assert joined.batch == 4


@pytest.mark.parametrize("other", [None, (torch.zeros(3, 5),), (torch.zeros(3, 2), torch.zeros(3, 1, 1))])
def test_memories_that_do_not_fit_together_are_left_out(other):
    cond = replace(text(1, 3), memory=(torch.zeros(3, 2),))
    assert Cond.cat([cond, replace(cond, memory=other)]).memory is None


@torch.no_grad()
@pytest.mark.parametrize("execution", ["batched", "split"])
def test_an_interval_halves_the_work_outside_it(execution):
    """Counted in samples that the network was given, and by FLOW's sigma/alpha = t/(1 − t)."""
    network, sizes = Reader(), []

    def counted(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sizes.append(len(x))
        return network(x, t, cond)

    guidance = {"name": "interval", "of": 3.0, "low": 0.25, "high": 4.0}
    conds = {"cond": text(1), "uncond": text(2)}
    denoise = denoise_fn(counted, FLOW, "flow", **conds, guidance=guidance, execution=execution)
    times = [0.95, 0.85, 0.7, 0.5, 0.3, 0.1]
    EULER.sample(denoise, X, FLOW, timesteps=times)
    inside = sum(0.25 < t / (1 - t) <= 4.0 for t in times)
    assert sum(sizes) == 2 * len(times) + 2 * inside
    assert len(sizes) == len(times) + (inside if execution == "split" else 0)

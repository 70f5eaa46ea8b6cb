"""Every registered part on a device that is not there: all of it is on the device, and none of its steps waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import Device
from torch import Tensor

from imagen_kit import caches, codecs, denoise_fn, denoisers, guidance, samplers, schedules, text_encoders
from imagen_kit.conditioning import Cond
from imagen_kit.guidance.base import renoised
from imagen_kit.samplers import graphs
from imagen_kit.samplers.graphs import graphed
from imagen_kit.samplers.grid import SPACINGS
from imagen_kit.samplers.step_lists import LENGTHS

FLOW = schedules.create("flow")
RECORDABLE = [name for name in samplers.names() if not samplers.create(name).decides]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(graphs, "WARM_UP", 0)  # a warm-up run is as the recorded one
    with torch.no_grad(), fake_cuda.device(monkeypatch) as made:
        yield made


def half(x: Tensor, t: Any) -> Tensor:
    return x * 0.5


def fitting(sampler: Any) -> Any:
    """A schedule that the sampler runs on."""
    for name in ("scaled_linear", "flow", "edm"):
        schedule = schedules.create(name)
        try:
            sampler.points(schedule, 4)
        except ValueError:
            continue
        return schedule
    raise AssertionError(f"no schedule for {sampler.name}")


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_sampler_is_recorded_with_noise_of_the_device(name: str, gpu: Device) -> None:
    sampler = samplers.create(name)
    schedule = fitting(sampler)
    x = torch.zeros(2, 3, 8, 8, device="cuda")
    generator = fake_cuda.Generator()
    made = graphed(half, sampler.tableau(schedule, 4), x, generator)
    gpu.clear()
    assert made(x).shape == x.shape
    assert (gpu.waits, gpu.scalars) == ([], [])
    (graph,) = gpu.graphs
    assert (graph.generators, graph.replays) == ([generator], 1)


@pytest.mark.parametrize("name", samplers.names())
def test_a_sampler_stays_on_the_device(name: str, gpu: Device) -> None:
    """Also with a grid for every sample and bfloat16 states; those that decide on their steps read what decides."""
    sampler = samplers.create(name)
    schedule, x = fitting(sampler), torch.zeros(2, 3, 8, 8, device="cuda", dtype=torch.bfloat16)
    noise = lambda: torch.zeros(x.shape, device="cuda")  # noqa: E731
    decides = sampler.decides
    out = sampler.sample(half, x, schedule, None if decides else 4, noise=noise)
    assert (out.dtype, out.is_cuda) == (x.dtype, True)
    assert bool(gpu.reads) == decides
    if decides:
        return
    assert gpu.sends == gpu.scalars == []
    sampler.sample(half, x, schedule, 4, generator=[torch.Generator(), torch.Generator()])  # of the host
    assert gpu.waits == []
    points = [point.t for point in sampler.points(schedule, 4)][:-1]
    sampler.sample(
        half, x, schedule, timesteps=torch.tensor([points, [0.999 * t for t in points]]), noise=noise
    )
    assert gpu.reads == gpu.scalars == []


@pytest.mark.parametrize("schedule", schedules.names())
def test_every_schedule_and_spacing_is_numbers_of_the_host(schedule: str, gpu: Device) -> None:
    chosen, x = schedules.create(schedule), torch.zeros(2, 3, 8, 8, device="cuda")
    went = 0
    for spacing in SPACINGS:
        try:
            sampler = samplers.create("dpmpp_2m", spacing=spacing)
            tableau = sampler.tableau(chosen, LENGTHS.get(spacing, 5))
        except ValueError:  # a spacing of other schedules
            continue
        went += 1
        made = graphed(half, tableau, x)
        assert made(x).is_cuda
    assert went > 3
    assert (gpu.waits, gpu.scalars) == ([], [])


NETWORK = {"width": 32, "depth": 2, "heads": 2, "context_dim": 8}
GUIDANCE: dict[str, Any] = {
    "apg": {"scale": 3.0},
    "autoguidance": {"scale": 2.0},
    "cads": {},
    "cfg": {"scale": 3.0},
    "cfg_pp": {"scale": 0.5},
    "cfg_zero": {"scale": 3.0},
    "classifier": {"scale": 1.0},
    "compose": {"weights": {"hat": 2.0}},
    "dynamic_threshold": {},
    "interval": {"of": 3.0, "high": 0.6, "by": "progress"},
    "pag": {"layers": 1},
    "perp_neg": {"scale": 3.0},
    "rescale": {"phi": 0.7},
    "scheduled": {"of": 5.0},
    "slg": {"layers": [0]},
    "static_threshold": {},
}


def text(tokens: int = 4) -> Cond:
    mask = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
    labels = torch.zeros(2, dtype=torch.int64, device="cuda")
    return Cond(tokens=torch.zeros(2, tokens, 8, device="cuda"), mask=mask, labels=labels)


class Plain(torch.nn.Module):
    """A network of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x * self.weight + cond.tokens.mean((1, 2)).view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)


class Classes(Plain):
    """A classifier of two classes."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return (x * self.weight).flatten(1)[:, :2]


LAYERED = ("pag", "slg")
ALONE = ("cfg", "apg", "cfg_pp", "cfg_zero", "interval", "scheduled", "perp_neg")


def guided(name: str, cache: str | None = None, execution: str = "batched") -> Any:
    """A guided network on the device, with plain guidance beside what is no guidance of its own."""
    layered = name in LAYERED or cache is not None
    network = denoisers.create("dit", **NETWORK) if layered else Plain()
    strategy = guidance.create(name, **GUIDANCE[name])
    return denoise_fn(
        network.to("cuda"),
        FLOW,
        "flow",
        cond=text(),
        uncond=text(3),
        others={"hat": text(2), "null": text(1)},
        networks={"weak": Plain().to("cuda"), "classifier": Classes().to("cuda")},
        guidance=[strategy] if name in ALONE else [2.0, strategy] if name != "cads" else [strategy, 2.0],
        cache=cache,
        execution=execution,
    )


def test_every_guidance_has_a_row() -> None:
    assert set(GUIDANCE) == set(guidance.names()), "add a row to GUIDANCE for the new strategy"


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_waits_for_nothing(name: str, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    # backward passes need a driver
    monkeypatch.setattr(torch.autograd, "grad", lambda out, of, *_, **__: (torch.zeros_like(of),))
    x, own = torch.zeros(2, 3, 8, 8, device="cuda"), [torch.Generator(), torch.Generator()]
    for execution in ("batched", "split"):
        denoise = guided(name, execution=execution)
        sampler = renoised(samplers.create("ddim"), denoise.guidance)
        tableau = sampler.tableau(FLOW, 2)
        gpu.clear()
        if name == "cads":  # draws noise from the samples' own generators: its loops are not recorded
            assert sampler.sample(denoise, x, FLOW, 2, generator=own).is_cuda
            assert (gpu.waits, gpu.scalars) == ([], [])
            continue
        made = graphed(denoise, tableau, x)
        assert made(x).is_cuda
        assert (gpu.waits, gpu.scalars) == ([], [])
    # times of every sample's own
    times = torch.tensor([[0.9, 0.4], [0.8, 0.5]])
    assert sampler.sample(guided(name), x, FLOW, timesteps=times, generator=own).is_cuda
    assert gpu.reads == []


@pytest.mark.parametrize("name", caches.names())
def test_a_cache_reads_at_most_one_answer_an_evaluation(name: str, gpu: Device) -> None:
    x, sampler = torch.zeros(2, 3, 8, 8, device="cuda"), samplers.create("euler")
    denoise = guided("cfg", cache=name)
    gpu.clear()
    if caches.create(name).capturable:
        assert graphed(denoise, sampler.tableau(FLOW, 4), x)(x).is_cuda
        assert gpu.reads == []
    else:
        assert sampler.sample(denoise, x, FLOW, 4).is_cuda
        assert 0 < len(set(gpu.reads)) <= 1
    assert (gpu.sends, gpu.scalars) == ([], [])


CODECS: dict[str, dict[str, Any]] = {
    "pixel": {},
    "kl": {"widths": [32, 32], "blocks": 1},
    "tiled": {"widths": [32, 32], "blocks": 1, "tile": 8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_codecs_wait_for_nothing(name: str, dtype: torch.dtype, gpu: Device) -> None:
    codec = codecs.create("kl" if name == "tiled" else name, **CODECS[name])
    if isinstance(codec, torch.nn.Module):
        codec.to("cuda", dtype)
    gpu.clear()
    z = codec.encode(torch.zeros(2, 3, 32, 32, device="cuda", dtype=dtype))
    assert codec.decode(z).shape == (2, 3, 32, 32)
    assert (gpu.waits, gpu.scalars) == ([], [])


ENCODERS: dict[str, dict[str, Any]] = {
    "t5": {"size": "tiny"},
    "clip": {"size": "tiny"},
    "open_clip": {"size": "tiny"},
    "concat": {"encoders": [{"name": "t5", "size": "tiny"}, {"name": "clip", "size": "tiny"}]},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_look_at_their_answer_once(name: str, gpu: Device) -> None:
    """Is all of it finite: one read a network."""
    encoder = text_encoders.create(name, **ENCODERS[name]).to("cuda")
    gpu.clear()
    told = encoder(["a", "b b b"])
    assert told.tokens.is_cuda
    assert told.mask.is_cuda
    assert len(gpu.reads) == len(getattr(encoder, "parts", [encoder]))
    gpu.clear()
    encoder(["b b b", "a"])  # remembered
    assert gpu.reads == []


def test_a_training_step_sends_its_numbers_without_waiting(gpu: Device) -> None:
    from imagen_kit.training.config import OptimizerConfig
    from imagen_kit.training.diffusion import denoising_loss
    from imagen_kit.training.loop import optimizers
    from imagen_kit.training.state import Ema

    network = denoisers.create("dit", **NETWORK).to("cuda").train()
    (optimizer,) = optimizers(network, OptimizerConfig(learning_rate=1e-4))
    shadow = Ema(network, 0.9)
    x0 = torch.zeros(2, 3, 8, 8, device="cuda")
    weight = lambda alpha, sigma: alpha**2 + sigma  # noqa: E731
    gpu.clear()
    for _ in range(2):
        with torch.enable_grad():
            t = torch.tensor([0.2, 0.7], dtype=torch.float64)
            loss = denoising_loss(network, FLOW, "flow", x0, x0, t, text(), weight)
        assert loss.is_cuda
        for parameter in network.parameters():  # a backward pass needs a driver
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        shadow.update(network, 3)
    assert (gpu.waits, gpu.scalars) == ([], [])

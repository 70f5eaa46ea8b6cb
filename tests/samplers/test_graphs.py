"""A run as one function, replayed from a CUDA graph where there is a CUDA device."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers.graphs import graphed

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
    with pytest.raises(KitError, match="give generators of the device 'cuda'"):
        graphed(lambda x, t: x, samplers.create("ddpm").tableau(SCHEDULE, 4), x, torch.Generator())

"""The seam of step caches: what lies outside and inside every place of every network."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.inner import (
    Count,
    counting,
    note,
    place,
    run_blocks,
    take,
    visiting,
    visitor,
)
from imagen_kit.denoisers.layers.skeleton import Unit

LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 32, "blocks": 2}, {"channels": 32, "blocks": 1}]
TRANSFORMER = {"width": 32, "depth": 4, "heads": 2}
NETWORKS = {
    "dit": TRANSFORMER,
    "pixart": {**TRANSFORMER, "context_dim": 8},
    "mmdit": {**TRANSFORMER, "context_dim": 8, "details": {"grid": 8}},
    "flux": {"width": 32, "depth": 2, "single_depth": 3, "heads": 2, "context_dim": 8},
    "uvit": {**TRANSFORMER, "details": {"grid": 4}},
    "unet": {"levels": LEVELS, "head_dim": 16},
    "adm": {"levels": LEVELS},
    "efficient_unet": {"levels": LEVELS},
    "edm2": {"in_channels": 3, "levels": LEVELS, "head_dim": 16},
}


class Watcher:
    """Passes everything on, or answers with what it is given."""

    def __init__(self, place, answer=None):
        self.place, self.answer, self.skipped, self.calls = place, answer, False, []

    def __call__(self, run, x, told, base, probe):
        y = run(x, *told) if self.answer is None else self.answer
        self.calls.append((x, base, probe, y))
        return y


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = denoisers.create(name, **NETWORKS[name]).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def inputs(name: str):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([0.3, 0.8])
    text = "context_dim" in NETWORKS[name]
    mask = torch.ones(2, 5, dtype=torch.bool) if text else None
    return x, t, Cond(tokens=torch.randn(2, 5, 8, generator=generator), mask=mask) if text else Cond()


def blocks(module: nn.Module) -> list[nn.Module]:
    """What the shares count: the units of U-Nets (in edm2 all blocks), the blocks of transformers."""
    parts = list(module.modules())
    units = [
        part for part in parts if isinstance(part, Unit) or type(part).__name__ in ("MPBlock", "UViTBlock")
    ]
    return units or [part for part in parts if getattr(part, "is_residual", False)]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_at_every_place_the_network_is_cut_and_put_together_again(name):
    module, given = made(name), inputs(name)
    expected, shares, ran = module(*given), module.shares, []
    for part in blocks(module):
        part.register_forward_hook(lambda part, inputs, output: ran.append(part))
    assert list(shares) == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1
    for k, share in enumerate(shares, 1):
        ran.clear()
        watcher = Watcher(k)
        with visiting(watcher):
            assert torch.equal(module(*given), expected)
        every = len(ran)
        ((x, base, probe, y),) = watcher.calls
        assert base is None or base.shape == y.shape
        assert len(x) == len(y) == len(probe) == 2
        ran.clear()
        with visiting(
            Watcher(k, answer=y)
        ):  # told the right answer, the outer part alone gives the right one
            assert torch.equal(module(*given), expected)
        assert 1 - len(ran) / every == pytest.approx(share)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_inner_part_runs_on_some_of_the_samples(name):
    """What it is told is cut along with its input."""
    module, given = made(name), inputs(name)

    class Halved(Watcher):
        def __call__(self, run, x, told, base, probe):
            rows = [[slice(0, 1)], [slice(1, 2)]]
            return torch.cat([run(take(x, row), *take(told, row)) for row in rows])

    with visiting(Halved(1)):
        found = module(*given)
    torch.testing.assert_close(found, module(*given), atol=1e-4, rtol=1e-4)


def test_run_blocks_by_hand():
    """Blocks that add their number: 0 + 1 are outside place 2, 2 + 3 inside; tokens before ``start`` are dropped."""
    x = torch.zeros(1, 3, 1)

    def block(i, x, c):
        return x + i + c

    told = (torch.ones(1, 1, 1),)
    assert torch.equal(run_blocks(block, 4, x, told, start=1), torch.full((1, 2, 1), 10.0))
    watcher = Watcher(2)
    with visiting(watcher):
        run_blocks(block, 4, x, told, start=1)
    ((given, base, probe, y),) = watcher.calls
    assert given.shape == (1, 3, 1)
    assert [float(part[0, 0, 0]) for part in (given, base, probe, y)] == [3.0, 3.0, 3.0, 10.0]
    assert base.shape == probe.shape == y.shape == (1, 2, 1)


def test_take_cuts_every_tensor_once_and_nothing_else():
    a, b = torch.arange(5), torch.arange(10).view(5, 2)
    rows = [slice(0, 1), slice(3, 5)]
    found = take((a, [b, None, b], (a,)), rows)
    assert found[0].tolist() == [0, 3, 4]
    assert found[1][0].tolist() == [[0, 1], [6, 7], [8, 9]]
    assert found[1][1] is None
    assert found[1][2] is found[1][0]
    assert isinstance(found[2], tuple)
    assert take(a, [slice(2, 4)]).tolist() == [2, 3]


def test_a_visit_is_of_this_thread_and_ends():
    one, other, seen = Watcher(1), Watcher(2), []
    assert visitor() is None
    assert place(7) == 7
    with visiting(one):
        with visiting(other):
            assert place(7) == 2
        assert visitor() is one
        thread = threading.Thread(target=lambda: seen.append(visitor()))
        thread.start()
        thread.join()
        assert place(7) == 1
        with pytest.raises(ValueError, match="spoilt"), visiting(other):
            raise ValueError("spoilt")
        assert visitor() is one
    assert visitor() is None
    assert seen == [None]


def test_counts_are_of_one_network_or_of_all():
    one, other = made("dit"), made("dit")
    with counting() as every, counting(one) as mine:
        note(one, asked=4, left_out=2, place=1)
        note(other, asked=2, left_out=2, place=2)
    note(one, asked=8, left_out=8, place=1)
    assert every == Count(6, 4, 2 * 0.75 + 2 * 0.5)
    assert mine == Count(4, 2, 1.5)
    assert mine.saved == 1.5 / 4
    assert Count().saved == 0.0

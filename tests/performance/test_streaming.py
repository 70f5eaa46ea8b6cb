"""Streamed blocks: the same numbers as with all weights there, in the memory of two blocks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.performance.streaming import Packed, Streamed, Streamer, repeated


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x + self.gain * self.inner(x)


class Stored:
    """Weights in a dict; remembers what was asked for."""

    def __init__(self, blocks):
        self.tensors = {
            f"{i}.{key}": value.clone()
            for i, block in enumerate(blocks)
            for key, value in block.state_dict().items()
        }
        self.asked: list[str] = []
        self.released: list[str] = []

    def get(self, name):
        self.asked.append(name)
        return self.tensors[name]

    def release(self, name):
        self.released.append(name)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return [Block(width) for width in (6, 6, 6, 6)]


def prefixes(blocks):
    return [f"{i}." for i in range(len(blocks))]


def run(blocks, x, order=None):
    for i in range(len(blocks)) if order is None else order:
        x = blocks[i](x)
    return x


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("order", [None, [3, 2, 1, 0], [0, 0, 2, 1, 3, 3], [2], [1, 3, 1, 3]])
@torch.no_grad()
def test_any_order_of_blocks_gives_the_same_bits(blocks, cyclic, order):
    x = torch.randn(3, 6)
    expected = [run(blocks, x, order) for _ in range(2)]
    streamer = Streamer(blocks, Stored(blocks), prefixes(blocks), cyclic=cyclic)
    for wanted in expected:
        assert torch.equal(run(blocks, x, order), wanted)
        assert all(p.is_meta for block in blocks for p in block.parameters())
    streamer.close()


@torch.no_grad()
def test_a_pass_reads_every_weight_once_in_order_and_lets_it_go(blocks):
    source = Stored(blocks)
    Streamer(blocks, source, prefixes(blocks))
    for passes in (1, 2):
        run(blocks, torch.randn(2, 6))
        assert source.asked == list(source.tensors) * passes
        assert source.released == source.asked


@torch.no_grad()
def test_the_next_block_comes_while_one_computes(blocks):
    source = Stored(blocks)
    coming = {i: threading.Event() for i in range(len(blocks))}
    original = source.get

    def get(name):
        coming[int(name.split(".")[0])].set()
        return original(name)

    source.get = get
    Streamer(blocks, source, prefixes(blocks))
    seen = []
    for i, block in enumerate(blocks[:-1]):
        block.inner.register_forward_pre_hook(lambda *_, i=i: seen.append(coming[i + 1].wait(20)))
    run(blocks, torch.randn(2, 6))
    assert seen == [True] * (len(blocks) - 1)  # else the wait would have run out


@torch.no_grad()
def test_room_is_that_of_two_blocks_and_is_given_back(blocks):
    held = sum(p.numel() * 4 for p in blocks[0].parameters())
    streamer = Streamer(blocks, Stored(blocks), prefixes(blocks))
    assert (
        2 * held <= streamer.room <= 2 * (held + 5 * 256)
    )  # five tensors, each begins at a multiple of 256 bytes
    run(blocks, torch.randn(2, 6))
    assert not streamer._slots
    cyclic = Streamer([Block(6)], Stored([Block(6)]), ["0."], cyclic=True)
    assert cyclic.room >= held


@torch.no_grad()
def test_a_layer_may_be_called_alone(blocks):
    x = torch.randn(2, 6)
    first, whole = blocks[2].inner[0](x), run(blocks, x)
    Streamer(blocks, Stored(blocks), prefixes(blocks), cyclic=True)
    assert torch.equal(blocks[2].inner[0](x), first)
    assert all(p.is_meta for p in blocks[2].parameters())
    assert torch.equal(run(blocks, x), whole)


@torch.no_grad()
def test_after_an_error_the_blocks_are_empty_and_run_again(blocks):
    x = torch.randn(2, 6)
    expected = run(blocks, x)
    Streamer(blocks, Stored(blocks), prefixes(blocks))
    with pytest.raises(RuntimeError):
        run(blocks, torch.randn(2, 5))
    assert all(p.is_meta for block in blocks for p in block.parameters())
    assert torch.equal(run(blocks, x), expected)


@torch.no_grad()
def test_an_error_of_the_source_reaches_the_caller(blocks):
    source = Stored(blocks)
    del source.tensors["2.gain"]
    Streamer(blocks, source, prefixes(blocks))
    with pytest.raises(KeyError, match=r"2\.gain"):
        run(blocks, torch.randn(2, 6))


@torch.no_grad()
def test_streamed_runs_in_the_dtype_it_is_moved_to(blocks):
    source, x = Stored(blocks), torch.randn(2, 6)
    low = [Block(6) for _ in blocks]
    for i, block in enumerate(low):
        block.load_state_dict(
            {k.removeprefix(f"{i}."): v for k, v in source.tensors.items() if k.startswith(f"{i}.")}
        )
        block.bfloat16()
    holder = nn.Module()
    holder.blocks = Streamed(blocks, source, prefixes(blocks), torch.float32)
    assert not list(holder.parameters())
    expected = run(low, x.bfloat16())
    holder.to(torch.bfloat16)
    assert torch.equal(run(holder.blocks, x.bfloat16()), expected)
    assert len(holder.blocks) == 4
    assert list(holder.blocks) == blocks


@torch.no_grad()
def test_packed_weights_keep_their_layout():
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last) for _ in range(3)]
    x = torch.randn(1, 4, 16, 16).to(memory_format=torch.channels_last)
    expected = run(convs, x)
    strides, seen = convs[0].weight.stride(), []
    Streamer(convs, Packed(convs), [""] * 3, cyclic=True)
    convs[1].register_forward_pre_hook(lambda module, _: seen.append(module.weight.stride()))
    assert torch.equal(run(convs, x), expected)
    assert torch.equal(run(convs, x), expected)
    assert seen == [strides] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dit", {"width": 32, "depth": 3, "heads": 2, "num_classes": 3}),
        (
            "unet",
            {"levels": [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": True}]},
        ),
    ],
)
@torch.no_grad()
def test_repeated_blocks_of_a_denoiser_hold_most_of_it_and_run_streamed(name, options):
    torch.manual_seed(0)
    network = denoisers.create(name, **options).eval()
    for p in network.parameters():
        p.normal_(0, 0.1)  # zero-initialised layers would hide what comes before them
    blocks = repeated(network)
    modules = [m for block in blocks.values() for m in block.modules()]
    assert len({id(m) for m in modules}) == len(modules)  # none inside another
    share = sum(p.numel() for block in blocks.values() for p in block.parameters())
    assert share > 0.4 * sum(p.numel() for p in network.parameters())
    channels = network.inputs.in_channels
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([0.3, 0.7])
    cond = Cond(labels=torch.tensor([0, 1])) if name == "dit" else Cond()
    expected = network(x, t, cond)
    stack = list(blocks.values())
    Streamer(stack, Packed(stack), [""] * len(stack), cyclic=True)
    for _ in range(2):
        assert torch.equal(network(x, t, cond), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_the_bits_are_those_of_the_whole(packed):
    torch.manual_seed(0)
    blocks = [Block(64) for _ in range(5)]
    source = Packed(blocks, pin=True) if packed else Stored(blocks)
    whole = [Block(64).cuda() for _ in blocks]
    for mine, theirs in zip(whole, blocks, strict=True):
        mine.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 64, device="cuda")
    names = [""] * 5 if packed else prefixes(blocks)
    Streamer(blocks, source, names, device="cuda", cyclic=packed)
    for _ in range(20):
        assert torch.equal(run(blocks, x), run(whole, x))

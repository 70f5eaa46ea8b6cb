"""Compiled blocks and networks: the same answers, one compilation for many blocks, plain errors."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import inputs, make

from imagen_kit.attention import use_backend
from imagen_kit.errors import KitError
from imagen_kit.performance import compiling
from imagen_kit.performance.compiling import Region, compile_blocks, compile_seconds, compile_whole, uncompile
from imagen_kit.performance.regions import blocks


class Counter:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without code generation: what is traced, and how often, is what is tested."""
    counter, plain = Counter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "kinds"), [("dit", 1), ("pixart", 1), ("mmdit", 2), ("flux", 2)])
def test_blocks_of_a_kind_share_one_compilation(compiler, name, kinds):
    network, fed = make(name), inputs(name)
    want = network(*fed)
    assert compile_seconds(network) == 0
    assert compile_blocks(network) == len(blocks(network))
    for _ in range(2):
        torch.testing.assert_close(network(*fed), want)
    assert compiler.graphs == kinds  # one whole graph a kind: the last block of mmdit is one of its own
    assert compile_seconds(network) > 0
    uncompile(network)
    assert torch.equal(network(*fed), want)
    assert compile_seconds(network) == 0


def test_all_shapes_of_a_unet_are_compiled(compiler):
    network, fed = make("adm"), inputs("adm")
    want = network(*fed)
    compile_blocks(network)
    torch.testing.assert_close(network(*fed), want)
    count = compiler.graphs
    assert count >= 6  # widths and attention differ: none is given up
    torch.testing.assert_close(network(*fed), want)
    assert compiler.graphs == count


def test_the_whole_network_is_one_graph(compiler):
    network, fed = make("dit"), inputs("dit")
    want = network(*fed)
    compile_whole(network)
    torch.testing.assert_close(network(*fed), want)
    assert compiler.graphs == 1


def test_blocks_follow_the_attention_backend_and_a_copy_its_own_weights(compiler):
    network, fed = make("dit"), inputs("dit")
    want = network(*fed)
    compile_blocks(network)
    network(*fed)
    with use_backend("eager"):
        torch.testing.assert_close(network(*fed), want)
    assert compiler.graphs == 2
    twin = copy.deepcopy(network)
    for p in twin.parameters():
        p.zero_()
    assert not twin(*fed).any()
    torch.testing.assert_close(network(*fed), want)


def test_hooks_on_blocks_still_act(compiler):
    network, fed = make("dit"), inputs("dit")
    plain = network(*fed)
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, out: args[0])  # as guidance that skips layers does
    want = network(*fed)
    compile_blocks(network)
    torch.testing.assert_close(network(*fed), want)
    assert compiler.graphs
    assert not torch.allclose(want, plain)


def test_no_compiler_is_one_plain_line(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(graph, examples):
        raise InvalidCxxCompiler

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend=fail, **options))
    network = make("dit")
    compile_blocks(network)
    # k_diffusion turns errors of the compiler off for the whole process when it is imported
    with torch._dynamo.config.patch(suppress_errors=False), pytest.raises(KitError) as error:
        network(*inputs("dit"))
    assert str(error.value).startswith("cannot compile DiTBlock here: ")
    assert str(error.value).endswith("(compile: off runs without)")
    assert "compiler" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_the_module_itself_pass():
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return x @ x

    region = Region(Wrong())
    region._run = region.module.forward
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        region(torch.ones(2, 3))


def test_seconds_are_those_between_the_compilers_callbacks(monkeypatch):
    times = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(times))
    clock = compiling._Clock()
    for _ in range(2):
        clock._start("any", "arguments")
        clock._end()
    assert clock.seconds == 3.5


@pytest.mark.slow
def test_generated_code_gives_the_same_answers():
    network, fed = make("dit"), inputs("dit")
    want = network(*fed)
    compile_blocks(network)
    # float32, fused and summed in another order
    torch.testing.assert_close(network(*fed), want, atol=1e-5, rtol=1e-4)

"""All choices together, carried out and said."""

from __future__ import annotations

import pytest
import torch
from networks import inputs, make, relative

from imagen_kit.errors import KitError
from imagen_kit.performance import Performance, apply


def test_nothing_asked_nothing_changed():
    network, fed = make("unet"), inputs("unet")
    want = network(*fed)
    applied = apply(network, Performance())
    assert torch.equal(network(*fed), want)
    assert applied.chosen == Performance()
    assert applied.compile_seconds == 0
    assert applied.words.endswith(": fp32 eager")


def test_everything_at_once(monkeypatch):
    pytest.importorskip("torchao")
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="eager", **options))
    network, (x, t, cond) = make("pixart"), inputs("pixart")
    want = network(x, t, cond)
    told = Performance(
        dtype="bf16",
        memory_format="channels_last",
        quantise="int8_weights",
        attention="eager",
        compile="blocks",
    )
    applied = apply(network, told)
    got = network(x, t, cond.to(dtype=torch.bfloat16))
    # bfloat16's 30 roundings of 2^-9 and int8's 12 of 0.7 %, as in the tests of either
    assert relative(got, want) < 30**0.5 * 2**-9 * 1.5 + 12**0.5 * 0.007 * 2
    assert applied.compile_seconds > 0
    assert applied.words.endswith(": bf16 channels-last int8-weights eager compiled-blocks")


def test_it_may_be_applied_again(monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="eager", **options))
    network, fed = make("dit"), inputs("dit")
    network.bfloat16().float()
    want = network(*fed)
    apply(network, Performance(dtype="bf16", attention="math", compile="whole"))
    network(*fed)
    apply(network, Performance(dtype="fp32"))
    assert torch.equal(network(*fed), want)


def test_auto_is_resolved():
    chosen = apply(make("dit"), Performance(dtype="auto")).chosen
    assert (chosen.dtype, chosen.memory_format) == ("fp32", "contiguous")  # far below a GFLOP


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"quantise": "fp8"}, "needs a GPU of compute capability 8.9"),
        ({"attention": "efficient"}, "needs a GPU"),
    ],
)
def test_what_is_not_there(told, says):
    if torch.cuda.is_available():
        pytest.skip("this machine may have it")
    pytest.importorskip("torchao")
    with pytest.raises(KitError, match=says):
        apply(make("dit"), Performance(**told))

"""A network's own attention backend: for its calls, and only for them."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import inputs, make
from torch import nn

import imagen_kit.attention as attention
from imagen_kit.errors import KitError
from imagen_kit.performance.attending import attend_by


class Asks(nn.Module):
    """Notes the backend that is active while it computes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(attention._active)
        if x is None:
            raise ValueError("no picture")
        return x


def test_active_during_the_call_alone():
    one, two = Asks(), Asks()
    attend_by(one, "eager")
    attend_by(two, "math")
    one(1), two(2), one(3)
    assert (one.seen, two.seen) == (["eager", "eager"], ["math"])
    with pytest.raises(ValueError, match="no picture"):
        one(None)
    assert attention._active == "sdpa"
    attend_by(one, None)
    one(4)
    assert one.seen[-1] == "sdpa"


def test_networks_within_each_other():
    inner, outer = Asks(), Asks()
    attend_by(inner, "eager")
    attend_by(outer, "math")
    outer.register_forward_pre_hook(lambda *_: inner(1) and None)
    outer(1)
    assert (inner.seen, outer.seen, attention._active) == (["eager"], ["math"], "sdpa")


def test_a_copy_has_the_same_choice_and_its_own_memory():
    network = Asks()
    attend_by(network, "eager")
    twin = copy.deepcopy(network)
    twin(1)
    assert twin.seen == ["eager"]
    assert attention._active == "sdpa"


@pytest.mark.parametrize("backend", ["flash", "math", "eager"])
@pytest.mark.parametrize("name", ["dit", "unet", "mmdit"])
def test_the_answer_is_the_same(name, backend):
    network, fed = make(name), inputs(name)
    want = network(*fed)
    attend_by(network, backend)
    # float32 softmax summed in another order
    torch.testing.assert_close(network(*fed), want, atol=2e-5 * float(want.std()), rtol=0)


def test_what_is_not_there_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attention.missing.cache_clear()
    with pytest.raises(KitError, match="attention backend 'cudnn' needs a GPU; choose from sdpa"):
        attend_by(Asks(), "cudnn")
    attention.missing.cache_clear()

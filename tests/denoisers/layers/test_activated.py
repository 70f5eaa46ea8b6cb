"""Products with their GELU, in one operation and in two, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit.denoisers.layers import activated
from imagen_kit.denoisers.layers.activated import LinearGelu, gated_gelu, split_gelu

ROWS, IN, OUT = (2, 100), 32, 400  # large enough an answer, and half of it, in either precision
# Four roundings of 2^-9 of numbers below 4 in bfloat16; sums of 32 terms of about 1 in float32.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4 * 4 * 2**-9}


def made(kind=nn.Linear, dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    layer = kind(IN, OUT, bias=bias, **options).to(dtype)
    return layer, torch.randn(*ROWS, IN).to(dtype)


def exact(layer, x):
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


def phi(x):
    """x·Φ(x) from the error function of the standard library's definition."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMS = {
    "gelu": (LinearGelu, lambda layer, x: layer(x), phi),
    "gelu by tanh": (
        lambda *a, **k: LinearGelu(*a, approximate="tanh", **k),
        lambda layer, x: layer(x),
        by_tanh,
    ),
    "gated": (nn.Linear, gated_gelu, lambda y: y[..., : OUT // 2] * phi(y[..., OUT // 2 :])),
    "split": (
        nn.Linear,
        lambda layer, x: torch.cat(split_gelu(layer, x, 96, "tanh"), -1),
        lambda y: torch.cat([y[..., :96], by_tanh(y[..., 96:])], -1),
    ),
}


@pytest.fixture
def fused(monkeypatch):
    """How often the one operation was used; it is for a gate as small as for the rest here."""
    monkeypatch.setattr(activated, "LEAST_GATED", activated.LEAST)
    calls, real = [], activated._fused
    monkeypatch.setattr(activated, "_fused", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_operation_is_the_product_and_its_gelu(form, dtype, bias, fused):
    kind, run, then = FORMS[form]
    layer, x = made(kind, dtype, bias)
    with torch.no_grad():
        got = run(layer, x)
    want = then(exact(layer, x))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=CLOSE[dtype], rtol=0)
    assert len(fused) == int(activated._has_onednn())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_operation_is_no_further_from_the_truth_than_two(form, dtype, fused):
    kind, run, then = FORMS[form]
    layer, x = made(kind, dtype)
    want = then(exact(layer, x))
    errors = []
    for derivatives in (False, True):
        with torch.set_grad_enabled(derivatives):
            errors.append((run(layer, x).double() - want).square().mean().sqrt().item())
    # the same sums in another order: a fifth for chance; in bfloat16 one rounding less
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_are_those_of_two_operations(form, fused):
    kind, run, then = FORMS[form]
    layer, x = made(kind)
    layer, x = layer.double(), x.double().requires_grad_()
    got = torch.autograd.grad(run(layer, x).square().sum(), [x, layer.weight])
    want = torch.autograd.grad(then(exact(layer, x)).square().sum(), [x, layer.weight])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    assert not fused


@pytest.mark.parametrize("form", FORMS)
def test_who_counts_sees_the_product(form, fused):
    kind, run, _ = FORMS[form]
    layer, x = made(kind)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(layer, x)
    assert counter.get_total_flops() == 2 * math.prod(ROWS) * IN * OUT
    assert not fused


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_other_devices_dtypes_and_small_answers_take_two_operations(form, fused):
    kind, run, _ = FORMS[form]
    layer, x = made(kind)
    assert run(layer, x[:1, :1]).shape[:2] == (1, 1)
    run(layer.double(), x.double())
    meta = layer.float().to("meta")
    assert run(meta, x.to("meta")).device.type == "meta"
    assert not fused


@pytest.mark.parametrize("form", ["gated", "split"])
@torch.no_grad()
def test_a_layer_that_is_more_than_its_weight_is_called(form, fused):
    """Hooks (offloading, precision), parametrised weights and subclasses (quantised, packed) see the whole layer."""
    kind, run, _ = FORMS[form]
    layer, x = made(kind)
    seen = []
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(1))
    run(layer, x)
    assert seen == [1]
    handle.remove()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    plain = run(layer, 2 * x)
    fused.clear()
    parametrize.register_parametrization(layer, "weight", Doubled())
    layer.bias.mul_(1)
    torch.testing.assert_close(run(layer, x), plain, atol=1e-4, rtol=1e-5)  # twice the sums of 32 terms
    assert not fused


@torch.no_grad()
def test_autocast_decides_the_dtype(fused):
    layer, x = made(LinearGelu)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not fused


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_compiled_code_is_left_to_the_compiler(form, fused):
    kind, run, then = FORMS[form]
    layer, x = made(kind)
    compiled = torch.compile(lambda x: run(layer, x), backend="eager", fullgraph=True)
    # sums of 32 terms of about 1, once in float32
    torch.testing.assert_close(compiled(x), then(exact(layer, x)).float(), atol=1e-5, rtol=0)
    assert not fused

"""Eight bits a weight: how far off they are, and that nothing else is lost."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagen_kit.performance import rowwise
from imagen_kit.performance.rowwise import LARGEST, Int8Linear


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 40), size=st.floats(1e-6, 1e4), seed=st.integers(0, 99))
def test_no_weight_is_off_by_more_than_half_a_step(rows, columns, size, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    layer = Int8Linear(columns, rows).take(weight)
    whole, scale = layer.weight, layer.scale
    assert whole.dtype == torch.int8
    assert whole.abs().amax() <= LARGEST
    error = (whole.double() * scale.double()[:, None] - weight.double()).abs()
    # Half a step, and the float32 rounding of w / s, at most 127 · 2⁻²⁴ of a step.
    assert (error <= scale.double()[:, None] * (0.5 + LARGEST * 2**-23)).all()
    assert (whole.abs().amax(1) == LARGEST).all()  # every row uses all of its range


def test_a_row_of_zeros_stays_zero():
    layer = Int8Linear(3, 2).take(torch.zeros(2, 3))
    assert not layer.weight.any()
    assert torch.equal(layer.scale, torch.ones(2))


def test_a_layer_computes_with_the_weights_it_stands_for():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(5, 32)
    layer = Int8Linear(32, 24).take(weight)
    stands_for = layer.weight.double() * layer.scale.double()[:, None]
    # float32 sums of 32 products of order 1: some 2⁻²⁴ each.
    torch.testing.assert_close(layer(x).double(), x.double() @ stands_for.T, atol=2e-5, rtol=0)
    # No output is off by more than half a step of its row for every unit of the input.
    bound = 0.5 * layer.scale.double() * x.double().abs().sum(1, keepdim=True)
    assert ((layer(x).double() - x.double() @ weight.double().T).abs() <= 1.001 * bound + 1e-5).all()
    low = layer.to(torch.bfloat16)
    assert low.scale.dtype == torch.float32  # a scale of eight bits would be worse than the weights
    out = low(x.bfloat16())
    assert out.dtype == torch.bfloat16
    # The integers are exact in bfloat16, so that only x and two roundings of the output count.
    torch.testing.assert_close(out.double(), x.bfloat16().double() @ stands_for.T, atol=2**-7, rtol=2**-7)


def test_a_large_layer_is_computed_in_pieces(monkeypatch):
    torch.manual_seed(0)
    layer, x = Int8Linear(16, 23).take(torch.randn(23, 16)), torch.randn(2, 3, 16)
    whole = layer(x)
    monkeypatch.setattr(rowwise, "IN_CACHE", 16 * 5)
    assert layer(x).shape == (2, 3, 23)
    torch.testing.assert_close(layer(x), whole, atol=1e-5, rtol=0)  # sums of 16 products, in another order


def test_memory_is_a_byte_a_weight_and_four_a_row():
    layer = Int8Linear(64, 8)
    assert sum(v.numel() * v.itemsize for v in layer.state_dict().values()) == 8 * 64 + 8 * 4
    assert not list(layer.parameters())

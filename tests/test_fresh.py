"""The same numbers as the usual operations, in the tensor's own memory where no derivative is recorded."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from imagen_kit import fresh

X, Y = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
CASES = {
    "silu": (fresh.silu, F.silu),
    "gelu": (fresh.gelu, F.gelu),
    "add": (lambda x: fresh.add(x, Y), lambda x: x + Y),
    "multiply": (lambda x: fresh.multiply(x, Y), lambda x: x * Y),
}


@pytest.mark.parametrize("name", CASES)
def test_in_place_where_no_derivative_is_recorded(name):
    ours, usual = CASES[name]
    x = X.clone()
    with torch.no_grad():
        out = ours(x)
    assert torch.equal(out, usual(X))
    assert out.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_usual_operation(name):
    ours, usual = CASES[name]
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    ours(x * 1).square().sum().backward()
    usual(z * 1).square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    assert torch.equal(x, X)


@pytest.mark.parametrize("name", ["add", "multiply"])
@torch.no_grad()
def test_a_wider_dtype_is_kept(name):
    x = X.float()
    assert CASES[name][0](x).dtype is torch.float64
    assert torch.equal(x, X.float())

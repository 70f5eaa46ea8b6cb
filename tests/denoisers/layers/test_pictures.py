"""Pictures grown and modulated, in both orders of memory, with derivatives and without."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from imagen_kit.denoisers.layers.pictures import grown, modulated

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [None, (6, 10), (5, 9), (7, 11)])
def test_nearest_neighbours_are_torchs(memory_format, dtype, size):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 5).to(dtype).contiguous(memory_format=memory_format)
    assert grown(x, size).equal(F.interpolate(x, size=size or (6, 10), mode="nearest"))
    assert grown(x[:, ::2, :, 1:], None).equal(F.interpolate(x[:, ::2, :, 1:], size=(6, 8), mode="nearest"))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_derivatives_of_both_are_those_of_finite_differences(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = (torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(grown, (x,))
    assert torch.autograd.gradcheck(modulated, (x, scale, shift))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_modulation_is_scale_and_shift(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    scale, shift = torch.randn(2, 6, 1, 1).chunk(2, dim=1)
    want = (x.double() * (1 + scale.double()) + shift.double()).float()
    with torch.no_grad():
        found = modulated(x.clone(memory_format=torch.preserve_format), scale, shift)
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)  # two float32 roundings

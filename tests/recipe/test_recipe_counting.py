"""Operations counted are those that torch's own counter finds, in every denoiser and for each sort of product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.recipe.counting import Operations

X, W = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3)
A, B = torch.randn(3, 5, 7), torch.randn(3, 7, 4)
CALLS = {
    "linear": lambda: F.linear(A, torch.randn(9, 7)),
    "linear with bias": lambda: F.linear(A, torch.randn(9, 7), torch.randn(9)),
    "conv1d": lambda: F.conv1d(A, torch.randn(4, 5, 3), padding=1),
    "conv2d": lambda: F.conv2d(X, W),
    "strided": lambda: F.conv2d(X, W, stride=2, padding=1),
    "grouped": lambda: F.conv2d(X, torch.randn(4, 3, 3, 3), groups=2),
    "transposed": lambda: F.conv_transpose2d(X, torch.randn(6, 4, 2, 2), stride=2),
    "matmul": lambda: A @ B,
    "bmm": lambda: torch.bmm(A, B),
    "broadcast": lambda: torch.matmul(A, torch.randn(7, 4)),
    "addmm": lambda: torch.addmm(torch.randn(5, 4), A[0], B[0]),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X),
    "cross attention": lambda: F.scaled_dot_product_attention(X, X[:, :, :3], torch.randn(2, 6, 3, 5)),
}


def both(call):
    with Operations() as ours:
        call()
    with FlopCounterMode(display=False) as theirs:
        call()
    return ours.flops, theirs.get_total_flops()


@pytest.mark.parametrize("name", CALLS)
def test_one_call_counts_as_torch_counts_it(name):
    ours, theirs = both(CALLS[name])
    assert ours == theirs > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "unet",
            {"levels": [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 1, "attention": True}]},
        ),
        ("efficient_unet", {}),
        ("dit", {"width": 32, "depth": 2, "heads": 2}),
        ("uvit", {"width": 32, "depth": 4, "heads": 2}),
        ("pixart", {"width": 32, "depth": 2, "heads": 2}),
    ],
)
def test_a_denoiser_counts_as_torch_counts_it(name, options):
    told = {"context_dim": 12}
    with torch.device("meta"), torch.no_grad():
        network = denoisers.create(name, **options, **told).eval()
        x = torch.randn(2, network.inputs.in_channels, 8, 8)
        cond = Cond(tokens=torch.randn(2, 5, 12), mask=torch.ones(2, 5, dtype=torch.bool))
        ours, theirs = both(lambda: network(x, torch.rand(2), cond))
    assert ours == theirs > 0

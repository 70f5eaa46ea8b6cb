"""Embeddings of times and places against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit.denoisers.layers.embeddings import PictureCoordinates, TimestepEmbedder, timestep_embedding


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_embedding_is_the_formula(shift):
    t, dim = torch.tensor([0.0, 0.37, 999.0]), 10
    got = timestep_embedding(t, dim, shift=shift)
    for row, time in zip(got, t.tolist(), strict=True):
        angles = [time * 10_000 ** (-i / (5 - shift)) for i in range(5)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # float32 holds an angle of 999 rad to 3e-5
        torch.testing.assert_close(row, torch.tensor(want), atol=1e-4, rtol=0)


def test_odd_widths_end_in_zero():
    assert timestep_embedding(torch.ones(2), 7).shape == (2, 7)
    assert not timestep_embedding(torch.ones(2), 7)[:, -1].any()


def test_times_keep_their_precision_in_a_half_network():
    """Neighbouring times of 1000 differ although bfloat16 itself cannot tell 998 from 999."""
    torch.manual_seed(0)
    embed = TimestepEmbedder(16).to(torch.bfloat16)
    a, b = embed(torch.tensor([998.0, 999.0]))
    assert a.dtype == torch.bfloat16
    assert (a - b).abs().max() > 1e-2


def test_scale_multiplies_time():
    torch.manual_seed(0)
    embed = TimestepEmbedder(16, scale=1000.0)
    unscaled = TimestepEmbedder(16)
    unscaled.load_state_dict(embed.state_dict())
    torch.testing.assert_close(embed(torch.tensor([0.25])), unscaled(torch.tensor([250.0])))


def test_picture_coordinates_are_relative_and_resolution_free():
    """The centre cell of 3×9 and of 9×3 lies at (1/2, 1/2), as the only cell of 1×1 does."""
    torch.manual_seed(0)
    places = PictureCoordinates(12)
    centre = places(1, 1)[0]
    torch.testing.assert_close(places(3, 9)[1 * 9 + 4], centre, atol=1e-5, rtol=0)
    torch.testing.assert_close(places(9, 3)[4 * 3 + 1], centre, atol=1e-5, rtol=0)
    assert torch.cdist(places(5, 7), places(5, 7)).add(torch.eye(35)).min() > 1e-3  # no two cells alike

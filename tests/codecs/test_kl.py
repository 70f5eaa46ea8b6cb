"""The KL autoencoder: scaling, draws, tiles and seams, impossible sizes. Parity is tested with the checkpoints."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from imagen_kit import codecs
from imagen_kit.codecs.kl import Kl, _ramp, _starts
from imagen_kit.errors import KitError


def small(**options):
    torch.manual_seed(0)
    return Kl(
        **{"channels": 4, "widths": [8, 16, 16], "blocks": 1, "groups": 4, "scale": 0.5, "shift": 0.25}
        | options
    )


@torch.no_grad()
def test_scale_and_shift_stand_outside_of_the_network():
    kl, picture = small(), torch.randn(2, 3, 16, 24)
    mean, std = kl.moments(picture)
    assert mean.shape == std.shape == (2, 4, 4, 6)
    assert kl.factor == 4
    torch.testing.assert_close(kl.encode(picture), 0.5 * (mean - 0.25))
    plain = small(scale=1.0, shift=0.0)
    plain.load_state_dict(kl.state_dict())
    torch.testing.assert_close(kl.decode(kl.encode(picture)), plain.decode(mean))
    torch.testing.assert_close(kl(picture), plain(picture))


@torch.no_grad()
def test_draws_have_the_moments_they_should():
    kl, picture = small(), torch.randn(1, 3, 8, 8)
    mean, std = kl.moments(picture)
    draws = kl.encode(picture.expand(2000, -1, -1, -1), sample=True) / kl.scale + kl.shift
    # standard errors are std / sqrt(2000) and std / sqrt(4000): five of them
    assert ((draws.mean(0) - mean[0]).abs() < 5 * std[0] / 2000**0.5).all()
    assert ((draws.std(0) / std[0] - 1).abs() < 5 / 4000**0.5).all()
    one, two = (kl.encode(picture, sample=True, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(one, two)


@torch.no_grad()
def test_tiles_meet_without_a_seam():
    """A decoder that looks at single cells gives the same picture in any number of tiles."""
    kl = small(tile=8, quant=False)
    kl.decoder = nn.Sequential(nn.Upsample(scale_factor=4.0), nn.Conv2d(4, 3, 1), nn.Tanh())
    latents = torch.randn(2, 4, 21, 12)
    whole = kl._decode(latents / kl.scale + kl.shift)
    torch.testing.assert_close(kl.decode(latents), whole)
    assert kl.decode(latents).shape == (2, 3, 84, 48)


@torch.no_grad()
def test_seams_are_blended():
    """Tiles that disagree (by their number) are joined by a ramp, not by a step."""
    kl, seen = small(tile=16, quant=False, widths=[8]), []

    class Numbered(nn.Module):
        def forward(self, z):
            seen.append(z)
            return torch.full((1, 3, *z.shape[-2:]), float(len(seen)))

    kl.decoder = Numbered()
    row = kl.decode(torch.zeros(1, 4, 16, 28))[0, 0, 0]
    assert len(seen) == 2
    assert (row[:12] == 1).all()
    assert (row[16:] == 2).all()
    steps = row.diff()
    assert (steps >= 0).all()
    assert steps.max() < 0.4


@torch.no_grad()
def test_small_pictures_are_decoded_in_one_piece():
    latents = torch.randn(1, 4, 8, 6)
    assert torch.equal(small(tile=8).decode(latents), small().decode(latents))


@torch.no_grad()
def test_tiles_of_a_local_network_make_the_whole_picture():
    """Without norms and attention, which look at a whole tile, only what lies within a few cells of a seam differs."""
    kl = small(tile=16, attend=False, overlap=0.5)
    for module in list(kl.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    latents = torch.randn(1, 4, 24, 16)
    tiled = kl.decode(latents)
    kl.tile = 0
    whole = kl.decode(latents)
    error = (tiled - whole).abs()
    assert error.max() > 0
    assert error.square().mean() < 1e-3 * whole.var()
    # tiles are the rows 0 to 64 and 32 to 96; what sees the border of neither is exact up to the ramps' rounding
    assert error[:, :, :8].max() < 1e-5


@pytest.mark.parametrize("length", [8, 9, 15, 16, 40, 41])
def test_tiles_cover_everything_and_overlap(length):
    starts = _starts(length, 8, 0.25)
    assert starts[0] == 0
    assert starts[-1] == length - 8
    assert all(0 < b - a <= 6 for a, b in itertools.pairwise(starts))
    ramp = _ramp(32, 0.25, torch.device("cpu"))
    assert ramp.min() > 0
    assert ramp.max() == 1
    assert torch.equal(ramp, ramp.flip(0))


def test_half_precision_stays_near():
    kl, picture = small().eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        want = kl(picture)
        got = kl.bfloat16()(picture.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_gradients_reach_every_parameter():
    kl = small()
    latents = kl.encode(torch.randn(1, 3, 8, 8), sample=True)
    kl.decode(latents).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in kl.named_parameters() if ".k.bias" not in n
    )


@pytest.mark.parametrize(
    ("name", "channels", "millions"),
    [("kl_sd", 4, 83.65), ("kl_sdxl", 4, 83.65), ("kl_sd3", 16, 83.82), ("kl_flux", 16, 83.82)],
)
def test_published_sizes(name, channels, millions):
    with torch.device("meta"):
        kl = codecs.create(name, tile=64)
    assert (kl.channels, kl.factor, kl.tile) == (channels, 8, 64)
    assert sum(p.numel() for p in kl.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert set(codecs.describe(name)["options"]) == {"tile", "overlap"}
    assert codecs.describe(name)["used_by"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [8, 18]}, "widths [8, 18] must be multiples of groups (4)"),
        ({"tile": 4}, "tile 4: give a side of at least 8"),
        ({"overlap": 0.7}, "overlap 0.7 must lie between 0 and 0.5"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(KitError) as error:
        small(**options)
    assert message in str(error.value)


def test_misshapen_inputs():
    kl = small()
    with pytest.raises(KitError, match=r"pictures of shape \(1, 4, 8, 8\): this kl takes \(b, 3, h, w\)"):
        kl.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(KitError, match="pictures of 8×10: sides must be multiples of 4"):
        kl.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(KitError, match=r"latents of shape \(4, 8, 8\): this kl takes \(b, 4, h, w\)"):
        kl.decode(torch.zeros(4, 8, 8))


@torch.no_grad()
def test_pictures_decoded_a_few_at_a_time_are_the_same(monkeypatch):
    kl, latents, sizes = small(), torch.randn(5, 4, 8, 8), []
    whole = kl.decode(latents)  # so small that all are decoded together
    two = 2 * 32 * 32 * 8  # numbers that the last layers of two pictures have, at 8 channels
    monkeypatch.setattr("imagen_kit.codecs.kl._ENOUGH", two)
    kl.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    some = kl.decode(latents)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(some, whole)  # sums may be taken in another order
    assert some.is_contiguous()

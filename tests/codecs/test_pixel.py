from __future__ import annotations

import torch

from imagen_kit import codecs


def test_every_codec_is_listed_here():
    # a new codec needs a row in this folder
    assert codecs.names() == ["kl", "kl_flux", "kl_sd", "kl_sd3", "kl_sd_x4", "kl_sdxl", "pixel"]


def test_pixel_is_the_identity_with_the_facts_recipes_wire():
    codec, pictures = codecs.create("pixel"), torch.randn(2, 3, 4, 4)
    assert (codec.channels, codec.factor) == (3, 1)
    assert torch.equal(codec.decode(codec.encode(pictures)), pictures)

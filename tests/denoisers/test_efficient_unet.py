"""What is particular to Imagen's networks: sizes, where they resample, how they scale sums, what they attend to."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import denoisers, guidance, samplers, schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.efficient_unet import EfficientUNet, ProjectedBlock
from imagen_kit.denoisers.layers.blocks import AttentionBlock
from imagen_kit.errors import KitError

SIZES = {"imagen_64": 2_305_382_403, "imagen_64_to_256": 578_907_011, "imagen_256_to_1024": 467_998_083}
# As the paper calls them. It calls the same blocks 600 M and 400 M; the second counts more than 400 M in
# convolutions alone, so that no choice left open reaches it.
PUBLISHED = {"imagen_64": (2e9, 0.16), "imagen_64_to_256": (600e6, 0.04), "imagen_256_to_1024": (400e6, 0.18)}
LEVELS = [{"channels": 16, "blocks": 1}, {"channels": 32, "blocks": 3, "attention": {"heads": 2}}]


def on_meta(name):
    with torch.device("meta"):
        return denoisers.create(name)


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    count = sum(p.numel() for p in on_meta(name).parameters())
    assert count == SIZES[name]
    published, tolerance = PUBLISHED[name]
    assert count == pytest.approx(published, rel=tolerance)


def test_cost_of_the_base():
    """1.56 TFLOP: the base's numbers in DeepFloyd IF's network, whose text and widths out differ a little."""
    tokens, mask = torch.empty(1, 77, 4096, device="meta"), torch.ones(1, 77, dtype=torch.bool, device="meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        denoisers.create("imagen_64")(
            torch.empty(1, 3, 64, 64), torch.empty(1), Cond(tokens=tokens, mask=mask)
        )
    assert counter.get_total_flops() == pytest.approx(1.56e12, rel=0.02)


def test_both_super_resolution_networks_share_their_convolutions():
    """The figures' blocks counted by hand: two convolutions and a shortcut a block, one to resample a level."""
    widths, blocks = (128, 256, 512, 1024), (2, 4, 8, 8)
    want = 9 * 128 * (6 + 3) + 128 + 3  # stem and head, weights and biases
    for i, (c, n) in enumerate(zip(widths, blocks, strict=True)):
        finer = widths[max(i - 1, 0)]
        want += 2 * n * (2 * 9 * c * c + c * c + 3 * c)
        want += 2 * 9 * c * finer + c + finer
    for name in ("imagen_64_to_256", "imagen_256_to_1024"):
        convolutions = [m for m in on_meta(name).modules() if isinstance(m, torch.nn.Conv2d)]
        assert sum(p.numel() for m in convolutions for p in m.parameters()) == want


@pytest.mark.parametrize("name", SIZES)
def test_sampling_defaults_name_parts_that_exist(name):
    facts = denoisers.describe(name)["sampling"]
    schedules.create(**facts["schedule"])
    assert facts["prediction"] == "eps"
    assert facts["sampler"] in samplers.names()
    guidance.create(**facts["threshold"])
    assert facts["guidance"] == (1.35 if name == "imagen_64" else 8.0)


def test_attention_stands_where_the_paper_puts_it():
    for name, cells in (("imagen_64_to_256", True), ("imagen_256_to_1024", False)):
        blocks = {k: m for k, m in on_meta(name).named_modules() if isinstance(m, AttentionBlock)}
        assert list(blocks) == [
            "down.3.7.attention",
            "up.0.7.attention",
        ]  # once, after the last residual block
        for block in blocks.values():
            assert (block.is_self_attention, block.mlp is not None) == (cells, cells)
            assert block.norm.num_channels // block.head_dim == 8
            assert block.context is not None
    sides = [m.norm.num_channels for m in on_meta("imagen_64").modules() if isinstance(m, AttentionBlock)]
    assert sorted(set(sides)) == [1024, 1536, 2048]  # 32², 16² and 8²


def test_pictures_shrink_before_and_grow_after_the_blocks():
    network = EfficientUNet(levels=LEVELS)
    sides = {}
    for name, module in network.named_modules():
        if isinstance(module, ProjectedBlock):
            module.register_forward_pre_hook(
                lambda _, args, name=name: sides.update({name: args[0].shape[-1]})
            )
    network(torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert {v for k, v in sides.items() if k.startswith(("down.0", "up.1"))} == {8}
    assert {v for k, v in sides.items() if k.startswith(("down.1", "up.0"))} == {4}
    assert [len(units) for units in network.up] == [3, 1]


def test_sums_keep_their_variance():
    block = ProjectedBlock(16, 8)
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    # the last convolution starts at zero, so that only the scaled shortcut is left
    torch.testing.assert_close(block(x, emb), block.skip(x) / 2**0.5)
    assert not block.is_residual

    network = EfficientUNet(levels=LEVELS).eval()
    skips, sums = [], []
    network.down[0][-1].register_forward_hook(lambda *args: skips.append(args[-1]))
    network.grow[0].register_forward_hook(lambda *args: skips.append(args[-1]))
    network.up[1][0].register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    network(torch.randn(1, 3, 16, 16), torch.zeros(1))
    torch.testing.assert_close(sums[0], sum(skips) / 2**0.5)


def test_mistakes_are_named():
    blind = [{"channels": 16, "attention": {"heads": 2, "cells": False}}]
    faults = {
        "context_dim": {"levels": blind},
        "at least one": {"levels": []},
        "without resample": {"levels": [{"channels": 16, "resample": "conv"}]},
        "kind is plain": {"levels": [{"channels": 16, "attention": {"kind": "transformer", "heads": 2}}]},
        "3 heads must divide": {"levels": [{"channels": 16, "attention": {"heads": 3}}]},
    }
    for message, config in faults.items():
        with pytest.raises(KitError, match=message) as error:
            denoisers.create("efficient_unet", **config)
        assert "\n" not in str(error.value)
    with pytest.raises(KitError, match="10×8: sides must be multiples of 4"):
        EfficientUNet(levels=LEVELS)(torch.zeros(1, 3, 10, 8), torch.zeros(1), Cond())

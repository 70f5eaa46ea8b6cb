"""What is particular to the U-Net: its levels, where text enters, its errors."""

from __future__ import annotations

import pytest
import torch

from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.blocks import AttentionBlock
from imagen_kit.denoisers.unet import Level, UNet
from imagen_kit.errors import KitError

LEVELS = [
    Level(32, blocks=2),
    Level(64, blocks=1, attention=True),
    {"channels": 96, "blocks": 1, "attention": True},
]


def test_levels_halve_the_picture_and_widen():
    seen = []
    net = UNet(levels=LEVELS, patch_size=2)
    for units in net.down:
        units[-1].register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    net.middle.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    net(torch.randn(1, 3, 16, 24), torch.zeros(1))
    assert seen == [(32, 8, 12), (64, 4, 6), (96, 2, 3), (96, 2, 3)]


def test_attention_stands_at_the_levels_that_ask_for_it():
    net = UNet(levels=LEVELS)
    # down 1 + 1, middle 1, up 2 + 2: one more block on the way up
    assert sum(isinstance(m, AttentionBlock) for m in net.modules()) == 7
    assert not any(
        isinstance(m, AttentionBlock) for units in (net.down[0], net.up[-1]) for m in units.modules()
    )


def test_each_skip_is_taken_once_and_last_made_first_taken():
    torch.manual_seed(0)
    net = UNet(levels=LEVELS)
    made, taken = [], []
    for module in [net.stem, *net.shrink, *(unit for units in net.down for unit in units)]:
        module.register_forward_hook(lambda _, __, out: made.append(out))
    for units in net.up:
        for unit in units:
            unit.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        net(torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert len(made) == len(taken) == 7
    for skip, joined in zip(reversed(made), taken, strict=True):
        assert torch.equal(joined[:, -skip.shape[1] :], skip)


def test_text_tokens_join_the_keys_of_the_cells():
    """One softmax over [text, cells]: with text keys that outweigh all others, cells hear the text alone."""
    torch.manual_seed(0)
    block = AttentionBlock(32, head_dim=16, context_dim=8, expansion=0)
    torch.nn.init.eye_(block.out.weight)
    with torch.no_grad():
        block.qkv.weight.zero_()
        block.qkv.bias[:32] = 1.0  # every query is the vector of ones
        block.context.weight[:32] = 0
        block.context.bias[:32] = 30.0  # text keys point the same way: logits of 30·16/4 against 0
        block.context.bias[32:] = 0
    text = torch.randn(2, 1, 8)
    x = torch.randn(2, 32, 4, 6)
    heard = block(x, text, torch.tensor([[True], [False]])) - x
    want = torch.nn.functional.linear(text[0], block.context.weight[32:])[0]
    torch.testing.assert_close(heard[0], want[:, None, None].expand(-1, 4, 6), atol=1e-5, rtol=0)
    assert not (heard[1] - heard[1].mean((1, 2), keepdim=True)).abs().gt(1e-6).any()
    torch.testing.assert_close(
        heard[1, :, 0, 0], block.qkv.bias[64:], atol=1e-6, rtol=0
    )  # masked: cells' values only


def test_places_tell_apart_equal_cells():
    torch.manual_seed(0)
    block = AttentionBlock(32, head_dim=16)
    torch.nn.init.normal_(block.out.weight)
    out = block(torch.ones(1, 32, 3, 5)).detach()
    assert out.flatten(2).std(-1).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "at least one level"),
        ({"levels": [{"chanels": 32}]}, "takes channels, blocks, attention, dropout"),
        ({"levels": [{"channels": 40, "attention": True}]}, "head_dim 32 must divide it"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(KitError) as error:
        UNet(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_dropout_leaves_pictures_alike():
    """Without text, two prompts of one batch give what no prompt gives: the mask reaches every level."""
    torch.manual_seed(0)
    net = UNet(levels=LEVELS, context_dim=8).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    cond = Cond(tokens=torch.randn(3, 4, 8), mask=torch.zeros(3, 4, dtype=torch.bool))
    with torch.no_grad():
        out = net(x, torch.full((3,), 10.0), cond)
    torch.testing.assert_close(out[1:], out[:1].expand(2, -1, -1, -1))

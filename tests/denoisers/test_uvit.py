"""U-ViT: the published sizes, its tokens and positions, its long skips."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.uvit import UViT
from imagen_kit.errors import KitError

TINY = {"width": 16, "depth": 2, "heads": 2, "details": {"grid": 4}}


def shaken(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return network.eval()


@pytest.mark.parametrize(
    # millions as the paper's table 1 gives them, of the data set that each size was made for
    ("size", "millions", "options"),
    [
        ("uvit_s", 44, {}),  # CIFAR-10, 32²
        ("uvit_s_deep", 58, {"in_channels": 4, "context_dim": 768}),  # MS-COCO, 32² latents
        ("uvit_m", 131, {"patch_size": 4, "num_classes": 1000}),  # ImageNet 64²
        ("uvit_l", 287, {"patch_size": 4, "num_classes": 1000}),
        ("uvit_h", 501, {"in_channels": 4, "num_classes": 1000}),  # ImageNet 256², 32² latents
    ],
)
def test_published_sizes(size, millions, options):
    with torch.device("meta"):
        network = denoisers.create(size, **options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    assert denoisers.describe(size)["sampling"]["prediction"] == "eps"


def test_keys_are_the_official_ones():
    names = set(UViT(**TINY, num_classes=3).state_dict())
    norms = ("norm1", "norm2")
    block = {
        f"{part}.{end}" for part in (*norms, "attn.proj", "mlp.fc1", "mlp.fc2") for end in ("weight", "bias")
    }
    block |= {"attn.qkv.weight"}
    ends = ("norm", "decoder_pred", "final_layer", "patch_embed.proj")
    want = {f"{part}.{end}" for part in ends for end in ("weight", "bias")} | {
        "pos_embed",
        "label_emb.weight",
    }
    for stem in ("in_blocks.0", "mid_block", "out_blocks.0"):
        want |= {f"{stem}.{name}" for name in block}
    assert names == want | {"out_blocks.0.skip_linear.weight", "out_blocks.0.skip_linear.bias"}


def test_positions():
    network = shaken(UViT(**{**TINY, "details": {"grid": 4, "text_tokens": 3}}, context_dim=5, num_classes=2))
    table = network.pos_embed
    assert table.shape == (1, 2 + 3 + 16, 16)
    assert torch.equal(network._positions(3, 4, 4), table)
    short = network._positions(1, 4, 4)
    assert torch.equal(short, torch.cat([table[:, :3], table[:, 5:]], dim=1))
    # twice the grid: the mean of four neighbours is what stands between them, a linear ramp stays one
    with torch.no_grad():
        network.pos_embed[:, 5:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    wide = network._positions(3, 8, 4)[0, 5:].view(8, 4, 16)
    torch.testing.assert_close(wide[:, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    with pytest.raises(KitError, match="4 text tokens: this uvit has positions for 3"):
        network._positions(4, 4, 4)


@torch.no_grad()
def test_the_last_block_is_told_what_the_first_one_saw():
    """Skips pair the blocks from the outside in."""
    network = shaken(UViT(**{**TINY, "depth": 4}))
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    seen = []
    for block in (*network.in_blocks, *network.out_blocks):
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    network(x, t)
    first, second, third, fourth = seen
    assert third[0][2] is second[1]
    assert fourth[0][2] is first[1]


def test_marks():
    network = UViT(**TINY)
    assert [block.is_residual for block in (*network.in_blocks, network.mid_block, *network.out_blocks)] == [
        True,
        True,
        False,
    ]


@torch.no_grad()
def test_labels_beside_text():
    network = shaken(UViT(**TINY, num_classes=3, context_dim=5))
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.ones(2), torch.randn(2, 4, 5)
    outs = [network(x, t, Cond(labels=torch.full((2,), label), tokens=tokens)) for label in (0, 3)]
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    other = network(x, t, Cond(labels=torch.zeros(2, dtype=torch.long), tokens=tokens.flip(1)))
    assert (outs[0] - other).abs().max() > 1e-3  # text tokens have places here


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "width 16 must be a multiple of heads (3)"),
        ({"depth": 3}, "depth must be even, not 3"),
        ({"width": 15, "heads": 3}, "width must be even, not 15"),
        ({"details": {"gird": 4}}, "did you mean 'grid'"),
        ({"runtime": {"checkpoint": True}}, "checkpointing"),
    ],
)
def test_faults_are_named(change, said):
    with pytest.raises(KitError) as error:
        UViT(**{**TINY, **change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)

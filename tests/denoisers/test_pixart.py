"""PixArt: the published sizes, its stretched positions, sizes as inputs, its caption for dropped text."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import denoisers
from imagen_kit.checkpoints import formats, rules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.layers.transformer import CompressedAttention, sincos_positions
from imagen_kit.denoisers.pixart import PixArt
from imagen_kit.errors import KitError

TINY = {"width": 24, "depth": 2, "heads": 2, "context_dim": 5}


def shaken(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return network.eval()


@pytest.mark.parametrize(
    # elements of diffusers' published files; the null caption of the official ones is a buffer
    ("size", "elements"),
    [
        ("pixart_xl_2", 610_856_096),
        ("pixart_xl_2_1024", 611_349_152),
        ("pixart_xl_2_sigma", 610_856_096),
        ("pixart_xl_2_sigma_2k", 610_856_096),
    ],
)
def test_published_sizes(size, elements):
    with torch.device("meta"):
        network = denoisers.create(size, null_tokens=120)
    assert sum(p.numel() for p in network.parameters()) == elements
    assert network.y_embedder.y_embedding.shape == (120, 4096)
    assert network.out_channels == 8
    assert denoisers.describe(size)["sampling"]["variance"] == "learned_range"


def test_positions_span_the_grid_of_training():
    """Twice the cells at half the step; ``interpolation`` 2 puts them at half the step once more."""
    coarse, fine = sincos_positions(4, 6, 16), sincos_positions(8, 12, 16, steps=(0.5, 0.5))
    torch.testing.assert_close(fine.view(8, 12, 16)[::2, ::2], coarse.view(4, 6, 16))
    stretched = sincos_positions(4, 6, 16, steps=(2.0, 1.0)).view(4, 6, 16)
    torch.testing.assert_close(stretched, sincos_positions(7, 6, 16).view(7, 6, 16)[::2])


@torch.no_grad()
def test_interpolation_is_a_smaller_grid():
    x, t, cond = torch.randn(1, 3, 8, 12), torch.ones(1), Cond(tokens=torch.randn(1, 3, 5))
    outs = [
        shaken(PixArt(**TINY, details={"grid": grid, "interpolation": scale}))(x, t, cond)
        for grid, scale in ((4, 1.0), (8, 2.0), (8, 1.0))
    ]
    torch.testing.assert_close(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-2


@torch.no_grad()
def test_height_and_width_are_told_apart():
    network = shaken(PixArt(**TINY, sizes=True))
    x, t, tokens = torch.randn(1, 3, 8, 8), torch.ones(1), torch.randn(1, 3, 5)

    def told(*size):
        return network(x, t, Cond(tokens=tokens, size=torch.tensor([size])))

    plain = told(512.0, 768.0, 0.67)
    for other in ((768.0, 512.0, 0.67), (512.0, 768.0, 1.5), (512.0, 767.0, 0.67)):
        assert (told(*other) - plain).abs().max() > 1e-3, other
    with pytest.raises(KitError, match="sizes"):
        network(x, t, Cond(tokens=tokens))


@torch.no_grad()
def test_the_null_caption_stands_for_dropped_text():
    network = shaken(PixArt(**TINY, null_tokens=4))
    null = network.y_embedder.y_embedding
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)
    tokens, mask = torch.randn(2, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    mask[1] = False
    got = network(x, t, Cond(tokens=tokens, mask=mask))
    want = network(x, t, Cond(tokens=torch.stack([tokens[0], null])))
    torch.testing.assert_close(got, want)
    longer = torch.nn.functional.pad(tokens, (0, 0, 0, 3)), torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(network(x, t, Cond(tokens=longer[0], mask=longer[1])), want)
    shorter = network(x, t, Cond(tokens=tokens[:, :3], mask=mask[:, :3]))
    torch.testing.assert_close(shorter[1], network(x, t, Cond(tokens=null[None, :3].expand(2, 3, 5)))[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 5}, "width 24 must be a multiple of heads (5)"),
        ({"width": 16, "sizes": True}, "multiple of 12"),
        ({"details": {"grd": 4}}, "did you mean 'grid'"),
        ({"details": {"grid": 0}}, "grid must be at least 1, not 0"),
        ({"runtime": {"checkpoint": True}}, "checkpointing"),
    ],
)
def test_faults_are_named(change, said):
    with pytest.raises(KitError) as error:
        PixArt(**{**TINY, **change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def compressed(compress, blocks, width=24):
    g = torch.Generator().manual_seed(2)
    details = {"compress": compress, "compressed": blocks}
    network = shaken(PixArt(3, width=width, depth=2, heads=2, context_dim=5, details=details))
    inputs = torch.randn(2, 3, 8, 12, generator=g), torch.tensor([1.0, 500.0])
    return network, (*inputs, Cond(tokens=torch.randn(2, 4, 5, generator=g)))


def test_compressed_keys_are_those_of_the_coarser_grid():
    """PixArt-Σ §3.3 with what it says written out: a mean of ratio² cells, normed, attended to by all cells."""
    attend = CompressedAttention(8, 2, 2)
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = attend.qkv(x).chunk(3, -1)
    blocks = [
        [(2 * i + a) * 6 + 2 * j + b for a in (0, 1) for b in (0, 1)] for i in range(2) for j in range(3)
    ]
    k, v = (
        torch.nn.functional.layer_norm(torch.stack([p[:, c].mean(1) for c in blocks], 1), (8,))
        for p in (k, v)
    )
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., head])
    # it starts as the mean: float32 sums in another order
    assert torch.allclose(attend(x, (4, 6)), attend.proj(torch.cat(heads, -1)), atol=1e-6)


@torch.no_grad()
def test_compression_of_some_blocks():
    plain, told = compressed(1, [])
    network, _ = compressed(2, [1])
    assert network(*told).shape == (2, 3, 8, 12)
    assert not hasattr(network.blocks[0].attn, "sr")
    # a plain network has the same weights but for those of the compression
    extra = set(network.state_dict()) - set(plain.state_dict())
    assert extra == {f"blocks.1.attn.{name}.{end}" for name in ("sr", "norm") for end in ("weight", "bias")}
    network.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(network(*told), plain(*told), atol=1e-3)
    # a sample does not depend on its batch
    x, t, cond = told
    assert torch.allclose(network(*told)[:1], network(x[:1], t[:1], cond[:1]), atol=1e-5)


def test_a_compressed_file_is_told_by_its_tensors():
    network, _ = compressed(2, [1], width=1152)  # a published width, so that its heads are known
    form = formats.get("pixart_official")
    told = {"details": {"grid": 4, "interpolation": 1.0}, "null_tokens": 3, "width": 1152}
    shapes = {k: tuple(v.shape) for k, v in rules.to_foreign(form.rules(told), network.state_dict()).items()}
    shapes["y_embedder.y_embedding"] = (3, 5)
    found = form.configure(formats.Shapes(shapes), None)["details"]
    assert (found["compress"], found["compressed"]) == (2, [1])
    with pytest.raises(KitError, match="diffusers' PixArt cannot say"):
        formats.get("pixart_diffusers").rules({"details": found})


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"compress": 0}, "compress must be a whole number"),
        ({"compress": True}, "compress must be a whole number"),
        ({"compress": 2, "compressed": [2]}, "no block 2; they are numbered 0 to 1"),
    ],
)
def test_wrong_compression_is_refused(details, message):
    with pytest.raises(KitError, match=message):
        PixArt(3, width=24, depth=2, heads=2, details=details)

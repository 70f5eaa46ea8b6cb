"""DiT against the official code's recorded outputs, its key map, and the published sizes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.dit import DiT, DiTBlock
from imagen_kit.denoisers.layers.transformer import sincos_positions
from imagen_kit.errors import KitError

DATA = Path(__file__).parents[1] / "data" / "denoisers"
SIZES = {"s": 32_865_056, "b": 130_315_808, "l": 457_840_672, "xl": 674_834_720}


@pytest.fixture(scope="module")
def official():
    with safe_open(DATA.parent / "checkpoints" / "dit_official.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors, file.metadata()


@pytest.fixture(scope="module")
def network(official):
    """The fixture's network; its keys are ours but for the position table."""
    config, tensors, _ = official
    dit = DiT(
        in_channels=config["in_channels"],
        learn_sigma=config["learn_sigma"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        num_classes=config["num_classes"],
    )
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    table = weights.pop("pos_embed")[0]
    side = config["input_size"] // config["patch_size"]
    # the table was made in float64; ours is float32: its own rounding and that of angles up to 3 rad
    torch.testing.assert_close(sincos_positions(side, side, config["hidden_size"]), table, atol=1e-6, rtol=0)
    dit.load_state_dict(weights, strict=True)
    return dit.eval()


def tolerance(official, name):
    """The fixture's own rule: three times the rounding of the reference's float32 run."""
    return 3 * max(2e-6, json.loads(official[2]["max_abs_diff_to_float64_run"])[name])


@pytest.mark.parity
@torch.no_grad()
def test_official_forward(official, network):
    tensors, seen = official[1], {}
    for name in ("blocks.0", "t_embedder", "y_embedder"):
        network.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[-1]}))
    out = network(tensors["inputs.x"], tensors["inputs.t"], Cond(labels=tensors["inputs.y"]))
    atol = tolerance(official, "forward")
    torch.testing.assert_close(out, tensors["outputs.forward"], atol=atol, rtol=0)
    for name, value in seen.items():
        torch.testing.assert_close(value, tensors[f"intermediates.{name}"], atol=atol, rtol=0)
    assert len(seen) == 3


@pytest.mark.parity
@torch.no_grad()
def test_official_guided_forward(official, network):
    """Guidance of three channels; the second half of the batch repeats the first with the null class."""
    tensors, scale = official[1], json.loads(official[2]["args"])["cfg_scale"]
    x, t, y = (tensors[f"inputs.cfg_{k}"] for k in "xty")
    half = len(x) // 2
    out = network(torch.cat([x[:half], x[:half]]), t, Cond(labels=y))
    cond, uncond = out[:half, :3], out[half:, :3]
    guided = (uncond + scale * (cond - uncond)).repeat(2, 1, 1, 1)
    atol = tolerance(official, "forward_with_cfg")
    got = torch.cat([guided, out[:, 3:]], dim=1)
    torch.testing.assert_close(got, tensors["outputs.forward_with_cfg"], atol=atol, rtol=0)


def test_full_size_keys_are_the_official_ones():
    keys = json.loads((DATA / "dit_xl_2_256_official.json").read_text())
    with torch.device("meta"):
        state = denoisers.create("dit_xl_2", in_channels=4, num_classes=1000, learn_sigma=True).state_dict()
    ours = {key: list(value.shape) for key, value in state.items()}
    assert ours | {"pos_embed": [1, 256, 1152]} == keys["keys"]
    assert sum(v.numel() for v in state.values()) + 256 * 1152 == keys["num_elements"] == 675_129_632


@pytest.mark.parametrize(
    ("size", "millions", "giga_macs"),
    [("s", 33, 6.06), ("b", 130, 23.01), ("l", 458, 80.70), ("xl", 675, 118.64)],
)
def test_published_sizes(size, millions, giga_macs):
    """Parameters and the paper's "Gflops" (multiply-adds) at 256² pixels, that is 32² latents."""
    with torch.device("meta"):
        dit = denoisers.create(f"dit_{size}_2", in_channels=4, num_classes=1000, learn_sigma=True)
        x, t, labels = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    count = sum(p.numel() for p in dit.parameters())
    assert count == SIZES[size]
    assert round(count / 1e6) == millions
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        dit(x, t, Cond(labels=labels))
    # matrix products only; the paper's counter adds norms and the like, 0.02 % at most
    assert flops.get_total_flops() / 2e9 == pytest.approx(giga_macs, rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [4, 8])
def test_larger_patches_differ_in_both_ends_only(size, patch):
    with torch.device("meta"):
        fine = denoisers.create(f"dit_{size}_2", num_classes=10)
        coarse = denoisers.create(f"dit_{size}_{patch}", num_classes=10)
    other = {k for k, v in coarse.state_dict().items() if v.shape != fine.state_dict()[k].shape}
    assert other == {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert coarse.patch_size == patch


def test_sizes_take_the_other_options_of_dit():
    shown = set(denoisers.describe("dit_b_4")["options"])
    assert shown == set(inspect.signature(DiT).parameters) - {"patch_size", "width", "depth", "heads"}
    with torch.device("meta"):
        dit = denoisers.create("dit_s_8", context_dim=16, low_res_channels=3, time_scale=1000.0)
    assert dit.t_embedder.scale == 1000.0
    with pytest.raises(KitError, match="'dit_s_2' has no option 'width'"):
        denoisers.create("dit_s_2", width=64)


def test_blocks_with_embedders_of_their_own():
    """Equal embedders in every block are one shared embedder; other details change the answer."""
    torch.manual_seed(0)
    shared = DiT(width=16, heads=2, depth=2, num_classes=3).eval()
    with torch.no_grad():
        for p in shared.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = shared.state_dict()
    own = {k: v for k, v in state.items() if not k.startswith(("t_embedder", "y_embedder"))}
    for k, v in state.items():
        if k not in own:
            own |= {f"embedders.{i}.{k}": v for i in range(2)}
    apart = DiT(width=16, heads=2, depth=2, num_classes=3, details={"block_embedders": True}).eval()
    apart.load_state_dict(own)
    call = (torch.randn(2, 3, 4, 4), torch.tensor([5.0, 400.0]), Cond(labels=torch.tensor([1, 3])))
    torch.testing.assert_close(apart(*call), shared(*call))
    for change in ({"frequency_shift": 1.0}, {"mlp_norm_eps": 0.1}):
        other = DiT(width=16, heads=2, depth=2, num_classes=3, details=change).eval()
        other.load_state_dict(state)
        assert (other(*call) - shared(*call)).abs().max() > 1e-3
    narrow = DiT(width=16, heads=2, depth=1, num_classes=3, details={"mlp_ratio": 2.5, "null_class": False})
    assert narrow.blocks[0].mlp.fc1.weight.shape == (40, 16)
    assert narrow.y_embedder.embedding_table.weight.shape == (3, 16)


def test_blocks_start_as_the_identity():
    """adaLN-Zero: gates and the text branch are silent, and only they."""
    torch.manual_seed(0)
    block, x, c = (
        DiT(width=64, heads=2, depth=1, context_dim=8).blocks[0],
        torch.randn(2, 6, 64),
        torch.randn(2, 64),
    )
    assert isinstance(block, DiTBlock)
    assert torch.equal(block(x, c, torch.randn(2, 5, 64), None), x)
    silent = {name for name, p in block.named_parameters() if p.ndim == 2 and not p.any()}
    assert silent == {"adaLN_modulation.1.weight", "cross_attn.proj.weight"}


def test_patches_keep_their_place_on_a_grid_that_is_not_square():
    """With silent blocks a patch of the answer depends on the same patch of the picture alone."""
    torch.manual_seed(0)
    dit = DiT(width=16, heads=2, depth=1, patch_size=2, in_channels=2)
    torch.nn.init.normal_(dit.final_layer.linear.weight)
    x = torch.randn(1, 2, 6, 10, requires_grad=True)
    out = dit(x, torch.tensor([3.0]))
    for row, column in ((0, 0), (1, 4), (2, 1)):
        patch = (slice(None), slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        (gradient,) = torch.autograd.grad(out[patch].square().sum(), x, retain_graph=True)
        assert gradient[patch].abs().min() > 0
        gradient[patch] = 0
        assert not gradient.any()


def test_pixels_keep_their_place_within_a_patch():
    """The last layer's outputs are ordered row, column, channel: seen by its bias alone."""
    dit = DiT(width=8, heads=2, depth=1, patch_size=2, in_channels=3)
    with torch.no_grad():
        dit.final_layer.linear.bias.copy_(torch.arange(12.0))
    out = dit(torch.zeros(1, 3, 4, 6), torch.zeros(1))
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                want = channel + 3 * (column + 2 * row)
                assert (out[0, channel, row::2, column::2] == want).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "heads": 6}, "width 100 must be a multiple of heads (6)"),
        ({"width": 6, "heads": 3}, "width 6 must be a multiple of 4"),
        (
            {"width": 48, "heads": 3, "context_dim": 8},
            "width 48 must be a multiple of 32 where it reads text",
        ),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"runtime": {"chanels_last": True}}, "did you mean 'channels_last'?"),
        ({"details": {"norm_eps": 1e-5}}, "did you mean 'mlp_norm_eps'?"),
        ({"details": {"block_embedders": True}}, "'block_embedders' needs class labels: give num_classes"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(KitError) as error:
        DiT(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 8)}, "picture of shape (2, 4, 8, 8): this dit takes (b, 3, h, w)"),
        ({"t": torch.zeros(())}, "times of shape (): give one for each of the 2 pictures"),
        ({"tokens": torch.zeros(2, 5, 9)}, "width 9: this dit was built with context_dim 8"),
        ({"pooled": None}, "pooled_dim: give it the pooled text"),
        ({"low_res": torch.zeros(2, 3, 4, 4)}, "low_res of shape (2, 3, 4, 4): this dit needs (b, 3, 8, 8)"),
    ],
)
def test_misshapen_inputs(change, message):
    dit = DiT(width=32, heads=2, depth=1, context_dim=8, pooled_dim=6, low_res_channels=3)
    cond = {"tokens": torch.zeros(2, 5, 8), "pooled": torch.zeros(2, 6)}
    cond |= {"low_res": torch.zeros(2, 3, 8, 8), "low_res_level": torch.zeros(2)}
    call = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2)}
    call |= {k: v for k, v in change.items() if k in call}
    with pytest.raises(KitError) as error:
        dit(**call, cond=Cond(**(cond | {k: v for k, v in change.items() if k not in call})))
    assert message in str(error.value)
    assert "\n" not in str(error.value)

"""ADM's classifier against the way down of ADM, its pool against torch's attention, its files against its sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from imagen_kit import checkpoints, denoisers
from imagen_kit.checkpoints import formats, rules
from imagen_kit.denoisers.adm_classifier import SIZES, ADMClassifier, AttentionPool, published
from imagen_kit.errors import KitError

LEVELS = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 2, "attention": True}]


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() if p.ndim > 1 else 4) ** -0.5)
    return module.eval()


def small(**options) -> ADMClassifier:
    return filled(ADMClassifier(7, 8, 3, LEVELS, head_dim=16, **options))  # type: ignore[return-value]


def test_the_way_down_is_that_of_adm():
    """With a U-Net's weights, the middle of both says the same."""
    network = small()
    whole = denoisers.create("adm", levels=[LEVELS[0], {**LEVELS[1], "attention": {"head_dim": 16}}])
    filled(whole, 1)
    shared = {key: value for key, value in whole.state_dict().items() if key in network.state_dict()}
    own = {key for key in network.state_dict() if key not in shared}
    assert own == {key for key in network.state_dict() if key.startswith("pool.")}
    shared.pop("norm_out.weight"), shared.pop("norm_out.bias")  # of the finest level there
    network.load_state_dict(shared, strict=False)
    seen: list[torch.Tensor] = []
    for module in (network, whole):
        module.middle.register_forward_hook(lambda m, i, out: seen.append(out))
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        assert network(x, t).shape == (2, 7)
        whole(x, t)
    assert torch.equal(*seen)


def test_the_pool_is_torchs_attention():
    pool = filled(AttentionPool(32, 3, 8, 5))
    x = torch.randn(2, 32, 3, 3, generator=torch.Generator().manual_seed(1))
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.places.t()[:, None]
    wanted, _ = F.multi_head_attention_forward(
        *(tokens[:1], tokens, tokens, 32, 4, pool.qkv.weight, pool.qkv.bias, None, None, False, 0.0),
        *(pool.out.weight, pool.out.bias),
    )
    # float32 sums in another order
    assert torch.allclose(pool(x), wanted[0], atol=2e-6)


@pytest.mark.parametrize(
    ("side", "count"), [(64, 65_438_568), (128, 42_568_040), (256, 54_096_360), (512, 54_448_360)]
)
def test_sizes(side, count):
    """The counts are those of guided-diffusion's own classifiers."""
    with torch.device("meta"):
        network = denoisers.create(f"adm_classifier_{side}")
        assert network(torch.empty(1, 3, side, side), torch.empty(1)).shape == (1, 1000)
    assert sum(p.numel() for p in network.parameters()) == count
    assert f"{count / 1e6:.0f} M" in denoisers.describe(f"adm_classifier_{side}")["summary"]


def foreign(network: torch.nn.Module, told) -> dict[str, torch.Tensor]:
    form = formats.get("adm_classifier_official")
    return rules.to_foreign(form.rules({**told, "head_dim": told.get("head_dim", 64)}), network.state_dict())


@pytest.mark.parametrize("side", SIZES)
def test_published_files_are_told_by_their_shapes(side):
    with torch.device("meta"):
        tensors = foreign(denoisers.create(f"adm_classifier_{side}"), published(side))
    assert tensors["out.2.qkv_proj.weight"].shape == (3 * 512, 512, 1)
    assert tensors["out.2.positional_embedding"].shape == (512, 65)
    assert {key.split(".")[0] for key in tensors} == {"time_embed", "input_blocks", "middle_block", "out"}
    shapes = formats.Shapes({key: tuple(value.shape) for key, value in tensors.items()})
    assert formats.detect(shapes).format.name == "adm_classifier_official"
    found = formats.get("adm_classifier_official").configure(shapes, None)
    assert found == {
        **published(side),
        "num_classes": 1000,
        "in_channels": 3,
        "head_dim": 64,
        "_per_head": True,
    }


def test_what_a_file_needs():
    """tests/data/checkpoints holds an official one that is run."""
    config = {
        "image_size": 16,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "attention_resolutions": [2],
        "num_head_channels": 16,
    }
    levels = [{"channels": 32, "blocks": 1}, {"channels": 64, "blocks": 1, "attention": True}]
    told = {"num_classes": 3, "image_size": 16, "levels": levels, "embed_dim": 32, "head_dim": 16}
    spoken = {**told, "levels": [{"attention": False, **level} for level in levels]}
    tensors = foreign(filled(ADMClassifier(**told)), spoken)
    assert isinstance(checkpoints.from_state_dict(tensors, config=config), ADMClassifier)
    with pytest.raises(KitError, match="of no published classifier of guided-diffusion; give the config"):
        checkpoints.from_state_dict(tensors)
    with pytest.raises(KitError, match="pool 'adaptive' is not supported; only 'attention'"):
        checkpoints.from_state_dict(tensors, config={**config, "pool": "adaptive"})
    with pytest.raises(KitError, match=r"input_blocks\.3\.1\.qkv\.weight"):
        checkpoints.from_state_dict(
            {key: value for key, value in tensors.items() if key != "input_blocks.3.1.qkv.weight"},
            config=config,
        )


def test_wrong_inputs_are_refused():
    network = small()
    with pytest.raises(KitError, match=r"this adm_classifier takes \(b, 3, 8, 8\)"):
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    with pytest.raises(KitError, match="one for each of the 2"):
        network(torch.zeros(2, 3, 8, 8), torch.zeros(1))
    with pytest.raises(KitError, match="cannot halve a side of 9"):
        ADMClassifier(7, 9, 3, LEVELS)
    with pytest.raises(KitError, match="head_dim 48 must divide"):
        ADMClassifier(7, 8, 3, LEVELS, head_dim=48)


def test_every_weight_learns():
    network = small()
    network(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])).square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []

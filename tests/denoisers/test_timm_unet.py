"""What is particular to denoisers on timm's backbones: families, sizes, weights from files, batch statistics."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from imagen_kit import denoisers
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError

# One tiny model of each family: the reductions of its maps and what is particular to it.
FAMILIES = {
    "test_convnext": (4, 8, 16, 32),
    "test_efficientnet": (2, 4, 8, 16, 32),  # batch normalisation joined with its activation
    "test_resnet": (2, 4, 8, 16, 32),
    "test_vit": (16, 16, 16),  # maps of one size
    "test_nfnet": (2, 4, 8, 16, 32),  # standardised weights, no normalisation
    "test_mambaout": (4, 8, 16, 32),  # channels last
    "mobilenetv3_small_050": (2, 4, 8, 16, 32),
    "regnetx_002": (2, 4, 8, 16, 32),
    "vgg11": (1, 2, 4, 8, 16, 32),  # a map of the picture's own size
    "eva02_tiny_patch14_224": (14, 14, 14),  # sides that are no multiples of 8
    "swin_tiny_patch4_window7_224": (4, 8, 16, 32),  # windows, and bound to 224² unless told otherwise
}
LARGE = {"vgg11", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"}
SMALL = {"width": 16, "widest": 32, "blocks": 1, "head_dim": 8}


def network(name, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = denoisers.create("timm_unet", backbone=name, **{"decoder": SMALL, **options}).eval()
        nn.init.normal_(built.head.weight, std=0.1)  # it starts at zero
    return built


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in FAMILIES])
def test_family(name):
    built = network(name, context_dim=6)
    assert tuple(built.backbone.reductions) == FAMILIES[name]
    side = 28 if 14 in FAMILIES[name] else 32
    g = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 3, side, 2 * side, generator=g), torch.randn(2, 5, 6, generator=g)
    cond = Cond(tokens=tokens, mask=torch.ones(2, 5, dtype=torch.bool))
    t = torch.tensor([10.0, 700.0])
    with torch.no_grad():
        out = built(x, t, cond)
        assert out.shape == x.shape
        # every input is read: time, text, and each picture alone
        assert (built(x, t / 2, cond) - out).abs().max() > 1e-3 * out.std()
        assert (built(x, t, Cond(tokens=-tokens, mask=cond.mask)) - out).abs().max() > 1e-3 * out.std()
        torch.testing.assert_close(built(x[:1], t[:1], cond[:1]), out[:1], atol=1e-4, rtol=1e-4)
    built.train()(x, t, cond).square().sum().backward()
    silent = [
        k for k, p in built.backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert silent == []


def test_training_does_not_mix_the_batch():
    """With batch normalisation an answer would depend on the other noise levels of its batch."""
    built = network("test_resnet").train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in built.modules())
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 900.0])
    torch.testing.assert_close(built(x, t)[:1], built(x[:1], t[:1]), atol=1e-5, rtol=1e-4)


def test_coarse_maps_can_be_left_out():
    built = network({"name": "test_convnext", "indices": [0, 1]})
    assert (built.reductions, built.widths) == ([1, 2, 4, 8], [16, 32, 32, 32])
    assert built(torch.zeros(1, 3, 8, 24), torch.zeros(1)).shape == (1, 3, 8, 24)
    with pytest.raises(KitError, match="12×8: sides must be multiples of 8"):
        built(torch.zeros(1, 3, 12, 8), torch.zeros(1))


@pytest.mark.parametrize(("name", "suffix"), [("test_convnext", "safetensors"), ("test_resnet", "pth")])
def test_weights_from_a_file(tmp_path, name, suffix):
    path = tmp_path / f"weights.{suffix}"
    weights = timm.create_model(name).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in weights.items()}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(weights, path)
    first = None
    for low_res in (0, 3):
        loaded = network(name, pretrained=path, low_res_channels=low_res).backbone.model
        strange = {
            k: p
            for k, p in loaded.named_parameters()
            if not any(p.shape == v.shape and torch.equal(p, v) for v in weights.values())
        }
        if not low_res:
            assert strange == {}  # the norms' affine weights too
            first = dict(loaded.named_parameters())
        else:
            # the first convolution is adapted to a picture joined with its low-resolution one
            ((key, adapted),) = strange.items()
            torch.testing.assert_close(adapted, torch.cat([first[key]] * 2, dim=1) / 2)


def test_maps_are_those_of_the_whole_model(tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = timm.create_model("test_convnext").eval()
    safetensors.torch.save_file(whole.state_dict(), path)
    x = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = network("test_convnext", pretrained=path).backbone(x)
        want = whole.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == 4
    for got, expected in zip(maps, want[-4:], strict=True):
        torch.testing.assert_close(got, expected)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = timm.create_model("test_convnext").state_dict()
    some = next(k for k in weights if k.startswith("stages.0") and k.endswith("weight"))
    faults = {
        f"missing {some}": {k: v for k, v in weights.items() if k != some},
        f"{some} is": {**weights, some: torch.zeros(2, 2)},
        "missing": timm.create_model("test_resnet").state_dict(),
    }
    for message, wrong in faults.items():
        safetensors.torch.save_file(wrong, path)
        with pytest.raises(KitError, match=message) as error:
            network("test_convnext", pretrained=path)
        assert "\n" not in str(error.value)
    with pytest.raises(KitError, match="no such file"):
        network("test_convnext", pretrained=tmp_path / "absent.pth")
    path.write_bytes(b"")
    with pytest.raises(KitError, match="cannot be read"):
        network("test_convnext", pretrained=path)


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_pickle_is_not_executed(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"state_dict": Trap()}, protocol=2))
    with pytest.raises(KitError, match="cannot be read"):
        network("test_convnext", pretrained=path)
    assert "executed" not in capsys.readouterr().out


def test_mistakes_are_named():
    faults = {
        "did you mean 'convnext_tiny'": {"backbone": "convnext_tinny"},
        "cannot be made an encoder": {"backbone": {"name": "test_convnext", "options": {"colour": 1}}},
        "over the batch": {"backbone": "levit_128s"},
        "takes name, indices, options": {"backbone": {"model": "test_convnext"}},
        "head_dim 24 must divide": {"backbone": "test_convnext", "decoder": {**SMALL, "head_dim": 24}},
        "widest at least width": {"backbone": "test_convnext", "decoder": {"width": 64, "widest": 32}},
    }
    for message, config in faults.items():
        with pytest.raises(KitError, match=message) as error:
            denoisers.create("timm_unet", **config)
        assert "\n" not in str(error.value)
    with pytest.raises(KitError, match="'test_maxvit' cannot take pictures of 64×64"):  # windows of 5 cells
        network("test_maxvit")(torch.zeros(1, 3, 64, 64), torch.zeros(1))


def test_timm_is_imported_only_to_build():
    code = "import sys; from imagen_kit import denoisers; denoisers.names(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

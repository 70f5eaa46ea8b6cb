"""Writing back: every bit as it was, in a file or folder that the community's own library reads."""

from __future__ import annotations

import json
import os

import pytest
import torch
from random_files import DIT, random_tensors
from safetensors.torch import load_file, save_file

from imagen_kit import checkpoints
from imagen_kit.checkpoints import facts, loading
from imagen_kit.checkpoints.loading import Origin
from imagen_kit.cli import main
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers.dit import DiT
from imagen_kit.errors import KitError

VAE = {"channels": 4, "widths": [32, 64], "blocks": 1, "groups": 32, "quant": True, "attend": True}


def equal(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_official_to_ours_and_back(dtype, dit, tmp_path):
    file = {k: v.to(dtype) for k, v in dit.items()}
    save_file(file, tmp_path / "a.safetensors")
    checkpoints.save(checkpoints.load(tmp_path / "a.safetensors"), tmp_path / "ours.safetensors")
    ours = checkpoints.load(tmp_path / "ours.safetensors")
    assert ours.checkpoint_origin.format == "dit_official"
    assert equal(load_file(tmp_path / "ours.safetensors"), ours.state_dict())
    checkpoints.save(ours, tmp_path / "back.safetensors", "official")
    assert equal(load_file(tmp_path / "back.safetensors"), file)


def test_diffusers_to_ours_and_back(dit_diffusers, tmp_path):
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 6,
        "sample_size": 8,
        "extra": [1],
    }
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text(json.dumps(config))
    save_file(dit_diffusers, first / "diffusion_pytorch_model.safetensors")
    checkpoints.save(checkpoints.load(first), tmp_path / "ours.safetensors")
    checkpoints.save(
        checkpoints.load(tmp_path / "ours.safetensors"), tmp_path / "new" / "folder", "diffusers"
    )
    folder = tmp_path / "new" / "folder"
    assert equal(load_file(folder / "diffusion_pytorch_model.safetensors"), dit_diffusers)
    assert json.loads((folder / "config.json").read_text()) == config


@pytest.mark.parity
def test_official_autoencoder_for_diffusers(tmp_path):
    """What is written from an LDM file, its own library reads and computes the same with."""
    diffusers = pytest.importorskip("diffusers")
    module = checkpoints.from_state_dict(random_tensors("kl_official", VAE))
    folder = checkpoints.save(module, tmp_path / "vae", "diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    picture = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        want, got = theirs.encode(picture).latent_dist.mean, module.moments(picture)[0]
    # weights of unit variance: values of some thousand, float32 rounding in proportion
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    back = checkpoints.save(checkpoints.load(folder), tmp_path / "back.safetensors", "official")
    assert equal(load_file(back), random_tensors("kl_official", VAE))


def test_networks_of_ones_own(tmp_path):
    options = {"in_channels": 2, "width": 32, "depth": 1, "heads": 2, "num_classes": 3, "context_dim": 8}
    torch.manual_seed(0)
    module = DiT(**options)
    with pytest.raises(KitError, match="this DiT came from no checkpoint"):
        checkpoints.save(module, tmp_path / "a.safetensors")
    checkpoints.save(module, tmp_path / "a.safetensors", origin=Origin("denoiser", "dit", options))
    again = checkpoints.load(tmp_path / "a.safetensors")
    assert equal(again.state_dict(), module.state_dict())
    cond = Cond(labels=torch.tensor([1]), tokens=torch.randn(1, 3, 8))
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([3.0])
    assert torch.equal(again(x, t, cond), module.eval()(x, t, cond))
    with pytest.raises(KitError, match="context_dim 8, which DiT's community formats do not know"):
        checkpoints.save(again, tmp_path / "b.safetensors", "official")


def test_layouts_that_cannot_say_it(dit, tmp_path):
    module = checkpoints.from_state_dict(dit)
    for layout, said in (
        ("diffusers", "embeds time as the official code does, which diffusers' DiT cannot"),
        ("dit_diffusers", "embeds time as the official code does"),
        ("kl_official", "holds a kl, not a dit"),
        ("oficial", "did you mean 'official'"),
    ):
        with pytest.raises(KitError, match=said):
            checkpoints.save(module, tmp_path / "a.safetensors", layout)
    with pytest.raises(KitError, match=r"give it the suffix \.safetensors"):
        checkpoints.save(module, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(dit, tmp_path, monkeypatch):
    module = checkpoints.from_state_dict(dit)
    path = checkpoints.save(module, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KitError, match="No space left"):
        checkpoints.save(module.half(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_note_of_origin(dit, tmp_path):
    save_file(dit, tmp_path / "a.safetensors", {"imagen_kit_checkpoint": '{"kind": "denoiser"}'})
    with pytest.raises(KitError, match="its note of what it holds is damaged"):
        checkpoints.load(tmp_path / "a.safetensors")
    note = Origin("denoiser", "dit", {"width": 7}).dump()
    save_file(dit, tmp_path / "b.safetensors", {"imagen_kit_checkpoint": note})
    with pytest.raises(KitError, match="width 7"):
        checkpoints.load(tmp_path / "b.safetensors")
    note = Origin("denoiser", "dit", {}).dump()
    save_file(dit, tmp_path / "c.safetensors", {"imagen_kit_checkpoint": note})
    with pytest.raises(KitError, match="missing"):
        checkpoints.load(tmp_path / "c.safetensors")


# ---- facts and the command line -------------------------------------------------------------------------------


def test_facts_of_a_published_checkpoint():
    """DiT-XL/2 at 256²: 675 M parameters, 118.6 G multiply-adds (Peebles & Xie, Table 4)."""
    kwargs = {**DIT, "width": 1152, "depth": 28, "heads": 16, "num_classes": 1000, "_size": 32}
    format = checkpoints.get("dit_official")
    origin = Origin("denoiser", "dit", kwargs, "dit_official")
    source = loading.Tensors(loading.expected(loading.hollow(origin), format, kwargs))
    told = facts.facts_of(*loading.recognise(source))
    assert told.size == "dit_xl_2"
    assert told.parameters == 674_834_720
    assert told.flops is not None
    assert told.flops / 2e9 == pytest.approx(118.64, rel=1e-3)
    assert told.evaluation == "one evaluation of 4×32×32"
    assert told.dtypes == ("float32",)
    assert told.bytes == 4 * (674_834_720 + 256 * 1152)


@pytest.fixture
def command(capsys):
    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_show_checkpoint(command, dit, tmp_path):
    save_file({k: v.half() for k, v in dit.items()}, tmp_path / "a.safetensors")
    code, out, _ = command("show", "checkpoint", tmp_path / "a.safetensors")
    assert code == 0
    rows = dict(line.strip().split(None, 1) for line in out.splitlines() if line.startswith("  "))
    assert rows["format"] == "dit_official"
    assert rows["denoiser"] == "dit"
    assert rows["dtype"] == "float16"
    assert "for one evaluation of 4×8×8" in rows["FLOPs"]
    count = sum(v.numel() for v in dit.values()) - dit["pos_embed"].numel()
    assert f"({count:,})" in rows["parameters"]
    assert rows["heads"] == "6"


def test_show_a_part_of_each_kind(command, tmp_path):
    save_file(random_tensors("kl_official", VAE), tmp_path / "vae.safetensors")
    _, out, _ = command("show", "checkpoint", tmp_path / "vae.safetensors")
    assert "kl_official" in out
    assert "decoding one picture of 128×128" in out


def test_convert(command, dit_diffusers, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 6}')
    save_file(dit_diffusers, folder / "diffusion_pytorch_model.safetensors")
    code, out, _ = command("convert", folder, tmp_path / "ours.safetensors")
    assert code == 0
    assert f"{folder} → {tmp_path / 'ours.safetensors'} (ours)" in out
    assert command("convert", tmp_path / "ours.safetensors", tmp_path / "out", "--to", "diffusers")[0] == 0
    assert equal(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), dit_diffusers)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "checkpoint"], "give the path"),
        (["show", "checkpoint", "{tmp}/none.safetensors"], "do not exist"),
        (["show", "checkpoint", "{tmp}/a.safetensors"], "is empty"),
        (["convert", "{tmp}/a.safetensors", "{tmp}/b.safetensors"], "is empty"),
        (["convert", "{tmp}/a.safetensors", "{tmp}/a.safetensors"], "write somewhere else"),
        (
            ["convert", "{tmp}/dit.safetensors", "{tmp}/b.safetensors", "--to", "diffuser"],
            "did you mean 'diffusers'?",
        ),
        (
            ["convert", "{tmp}/dit.safetensors", "{tmp}/b.safetensors", "--kind", "coder"],
            "did you mean 'codec'?",
        ),
    ],
)
def test_refused_commands(words, said, command, dit, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    save_file(dit, tmp_path / "dit.safetensors")
    code, out, err = command(*[word.format(tmp=tmp_path) for word in words])
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1

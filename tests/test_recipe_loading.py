"""Weights from the hub, with the hub played by a folder: nothing here reaches a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import RepositoryNotFoundError, filter_repo_objects

from imagen_kit import checkpoints, codecs, recipe
from imagen_kit.errors import KitError, RecipeError
from imagen_kit.recipe.loading import locate

KL = {
    "channels": 4,
    "widths": [32],
    "blocks": 1,
    "groups": 32,
    "scale": 0.5,
    "shift": 0.0,
    "quant": True,
    "attend": True,
    "picture_channels": 3,
}
RECIPE = """
name: hub
labels: {classes: 3}
stages:
  - name: base
    size: 8
    schedule: linear
    prediction: eps
    codec: {name: kl, widths: [32], blocks: 1, scale: 0.5, weights: someone/small/vae}
    denoiser: {name: dit, width: 32, depth: 1, heads: 2}
    sampler: {name: ddim, steps: 1}
"""


class Hub:
    """Repositories in a folder, and what was asked for."""

    def __init__(self, root: Path):
        self.root, self.cache, self.asked = root / "hub", root / "cache", []

    def add(self, name: str, data: bytes | None = b"") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or b"")
        return path

    def snapshot_download(self, repo_id, *, allow_patterns=None, ignore_patterns=None, **options):
        self.asked.append((repo_id, allow_patterns))
        source = self.root / repo_id
        if not source.is_dir():
            said = f"404 Client Error.\nRepository Not Found for url: {repo_id}"
            raise RepositoryNotFoundError(said, response=_Answer())
        target = self.cache / repo_id
        target.mkdir(parents=True, exist_ok=True)
        files = [str(f.relative_to(source)) for f in sorted(source.rglob("*")) if f.is_file()]
        for name in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    def downloaded(self) -> list[str]:
        return sorted(str(f.relative_to(self.cache)) for f in self.cache.rglob("*") if f.is_file())


class _Answer:
    headers: dict[str, str] = {}
    request = None
    status_code = 404


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_only_the_folder_asked_for_is_downloaded(hub, tmp_path):
    for name in (
        "someone/small/transformer/config.json",
        "someone/small/transformer/diffusion_pytorch_model.safetensors",
        "someone/small/transformer/diffusion_pytorch_model.fp16.safetensors",
        "someone/small/transformer/diffusion_pytorch_model.non_ema.safetensors",
        "someone/small/transformer/diffusion_pytorch_model.bin",
        "someone/small/transformer/more/model.safetensors",
        "someone/small/vae/diffusion_pytorch_model.safetensors",
        "someone/small/model.safetensors",
    ):
        hub.add(name)
    assert locate("someone/small/transformer", tmp_path) == hub.cache / "someone/small/transformer"
    assert hub.downloaded() == [
        "someone/small/transformer/config.json",
        "someone/small/transformer/diffusion_pytorch_model.safetensors",
    ]
    # the first folder alone, not all that is in it
    assert locate("someone/small", tmp_path) == hub.cache / "someone/small"
    assert "someone/small/model.safetensors" in hub.downloaded()
    assert not any("vae" in name for name in hub.downloaded())


def test_pickles_are_fetched_where_there_is_nothing_else(hub, tmp_path):
    hub.add("someone/old/unet/config.json")
    hub.add("someone/old/unet/diffusion_pytorch_model.bin")
    locate("someone/old/unet", tmp_path)
    assert [patterns for _, patterns in hub.asked] == [["unet/*.json", "unet/*.safetensors"], ["unet/*.bin"]]
    assert "someone/old/unet/diffusion_pytorch_model.bin" in hub.downloaded()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", r"weights 'no/such' are no file or folder here, nor to be had from the hub: 404"),
        ("someone/small/unet", "the hub's someone/small holds no weights in its folder 'unet'"),
        ("someone/empty", "the hub's someone/empty holds no weights in its first folder"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(hub, tmp_path, name, message):
    hub.add("someone/small/transformer/model.safetensors")
    hub.add("someone/empty/README.md")
    with pytest.raises(KitError, match=message) as error:
        locate(name, tmp_path)
    assert "\n" not in str(error.value)


def test_files_here_go_before_the_hub(hub, tmp_path):
    beside = tmp_path / "recipes" / "someone" / "small"
    beside.mkdir(parents=True)
    assert locate("someone/small", tmp_path / "recipes") == beside
    # a file name is never taken for a hub id
    with pytest.raises(KitError, match="do not exist"):
        locate("someone/model.safetensors", tmp_path)
    assert hub.asked == []


def test_a_recipe_is_built_from_the_hub(hub, tmp_path):
    torch.manual_seed(0)
    codec = codecs.create("kl", widths=[32], blocks=1, scale=0.5)
    origin = checkpoints.Origin("codec", "kl", KL)
    checkpoints.save(codec, hub.root / "someone" / "small" / "vae", layout="diffusers", origin=origin)
    (tmp_path / "hub.yaml").write_text(RECIPE)
    built = recipe.load(tmp_path / "hub.yaml").build().stages[0].codec.state_dict()
    assert built.keys() == codec.state_dict().keys()
    assert all(torch.equal(built[key], value) for key, value in codec.state_dict().items())
    missing = recipe.load(tmp_path / "hub.yaml", ["stages.0.weights=someone/small/unet"])
    with pytest.raises(RecipeError, match=r"stages\.0\.weights: .* holds no weights in its folder 'unet'"):
        missing.build()

"""Where weight specs lead."""

from __future__ import annotations

import pytest

from imagen_kit import weights_path
from imagen_kit.errors import KitError


@pytest.fixture
def package(monkeypatch, tmp_path):
    (tmp_path / "weights" / "pocket" / "t5").mkdir(parents=True)
    (tmp_path / "weights" / "pocket" / "base.safetensors").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"")
    monkeypatch.setattr(weights_path, "__file__", str(tmp_path / "weights_path.py"))
    return tmp_path / "weights"


def test_package_prefix(package):
    assert weights_path.resolve("package:pocket/t5") == package / "pocket" / "t5"
    assert weights_path.resolve("package:pocket/base.safetensors").is_file()


def test_plain_paths(tmp_path, monkeypatch):
    assert weights_path.resolve(tmp_path) == tmp_path
    assert weights_path.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert weights_path.resolve("~/mine") == tmp_path / "mine"


def test_missing_names_the_nearest(package, tmp_path):
    with pytest.raises(KitError, match=r"did you mean 'package:pocket/base.safetensors'\?"):
        weights_path.resolve("package:pocket/bass.safetensors")
    with pytest.raises(KitError, match=r"'/no/such/file' do not exist$"):
        weights_path.resolve("/no/such/file")
    with pytest.raises(KitError, match="point outside the package"):
        weights_path.resolve("package:../secret")

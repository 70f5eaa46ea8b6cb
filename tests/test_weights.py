"""Weight files: round trips, atomic saving, and one plain line for each way a file can be wrong."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from imagen_kit import weights
from imagen_kit.errors import KitError
from imagen_kit.files import replacing, require_writable


def model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_round_trip_keeps_every_bit_and_the_metadata(tmp_path):
    first, second = model(), model()
    path = weights.save_safetensors(tmp_path / "new" / "w.safetensors", first.state_dict(), {"steps": "12"})
    weights.load_strict(second, path)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert weights.read_metadata(path)["steps"] == "12"


def test_half_precision_files_load_into_float32(tmp_path):
    first, second = model(), model()
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in first.state_dict().items()}
    weights.load_strict(second, weights.save_safetensors(tmp_path / "w.safetensors", half))
    assert second[0].weight.dtype == torch.float32
    assert torch.equal(second[0].weight, half["0.weight"].float())


def test_tied_and_strided_tensors_are_stored(tmp_path):
    table = torch.arange(6.0).view(2, 3)
    path = weights.save_safetensors(tmp_path / "w.safetensors", {"a": table, "b": table, "c": table.T})
    read = weights.read_safetensors(path)
    assert torch.equal(read["a"], table)
    assert torch.equal(read["b"], table)
    assert torch.equal(read["c"], table.T)


def test_misfit_lists_everything_and_changes_nothing(tmp_path):
    tensors = dict(model().state_dict())
    tensors["0.wieght"] = tensors.pop("0.weight")
    tensors["1.bias"] = torch.zeros(5)
    path = weights.save_safetensors(tmp_path / "w.safetensors", tensors)
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(KitError) as error:
        weights.load_strict(target, path)
    text = one_line(error)
    for part in ("1 missing (0.weight)", "1 extra (0.wieght)", "1 misshapen (1.bias is 5, should be 4)"):
        assert part in text
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_long_lists_are_cut_short(tmp_path):
    path = weights.save_safetensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(KitError, match=r"7 missing \(.* and 3 more\)"):
        weights.load_strict(model(), path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_file(tmp_path, kept):
    path = weights.save_safetensors(tmp_path / "w.safetensors", model().state_dict())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(KitError, match=r"truncated|cut off|empty") as error:
        weights.load_strict(model(), path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "content", [b"not a weight file at all", b"\x0a" + bytes(7) + b"[1, 2, 33]", b"\x04" + bytes(7) + b"null"]
)
def test_file_that_is_not_safetensors(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(KitError, match="not a safetensors file") as error:
        weights.load_strict(model(), path)
    one_line(error)


def test_pickle_is_refused_unread(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(model().state_dict(), path)
    with pytest.raises(KitError, match="pickled"):
        weights.load_strict(model(), path)


def test_bad_offsets_are_one_plain_line(tmp_path):
    text = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(KitError) as error:
        weights.read_safetensors(path)
    one_line(error)


def test_missing_file_names_the_nearest(tmp_path):
    weights.save_safetensors(tmp_path / "base.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(KitError, match=r"no such file; did you mean base\.safetensors\?"):
        weights.load_strict(model(), tmp_path / "bsae.safetensors")


def test_failed_writing_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def crash():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_one_plain_line_and_leaves_nothing(tmp_path):
    def fill():
        with replacing(tmp_path / "a.txt"):
            raise OSError(28, "No space left on device")

    with pytest.raises(KitError, match=r"cannot write .*a\.txt: No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    weights.save_safetensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_require_writable(tmp_path):
    assert require_writable(tmp_path / "a.png") == tmp_path / "a.png"
    require_writable(tmp_path / "deep" / "folder", folder=True)
    (tmp_path / "file").write_text("x")
    for bad, folder in ((tmp_path / "no" / "a.png", False), (tmp_path, False), (tmp_path / "file", True),
                        (tmp_path / "file" / "below", True), ("/proc/x.png", False)):  # fmt: skip
        with pytest.raises(KitError, match="cannot write"):
            require_writable(bad, folder=folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(KitError, match="cannot write"):
        weights.save_safetensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """A header of 128 bytes (modulo 256) begins with a pickle's first byte, and is none."""
    path, tensors = tmp_path / "w.safetensors", model().state_dict()
    weights.save_safetensors(path, tensors, {"padding": ""})
    missing = (0x80 - path.read_bytes()[0]) % 256
    weights.save_safetensors(path, tensors, {"padding": "x" * missing})
    assert path.read_bytes()[:1] == b"\x80"
    assert weights.read_safetensors(path).keys() == tensors.keys()

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_kit.errors import KitError
from imagen_kit.images import Images, output_paths


def pictures(count: int) -> Images:
    grey = torch.linspace(0, 1, count).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 5)
    return Images(grey, [f"prompt {i}" for i in range(count)], list(range(count)))


def test_a_png_holds_the_rounded_values(tmp_path):
    tensor = torch.rand(1, 3, 6, 7)
    (path,) = Images(tensor, ["a"], [0]).save(tmp_path / "a.png")
    read = np.asarray(Image.open(path), dtype=np.int64).transpose(2, 0, 1)
    assert np.array_equal(read, (tensor[0].double() * 255).round().numpy())


def test_values_outside_the_range_are_clipped_not_wrapped():
    tensor = torch.tensor([-0.2, 0.0, 1.0, 1.3]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert Images(tensor, ["a"], [0]).uint8()[0, 0, :, 0].tolist() == [0, 0, 255, 255]


def test_several_pictures_are_numbered_beside_the_file_or_in_the_folder(tmp_path):
    found = pictures(3)
    assert [p.name for p in found.save(tmp_path / "a.webp")] == ["a-00.webp", "a-01.webp", "a-02.webp"]
    assert [p.name for p in found.save(tmp_path / "new" / "folder")] == ["00.png", "01.png", "02.png"]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["00.png", "01.png", "02.png"]
    assert len(found) == len(found.pil()) == 3


def test_a_folder_with_a_dot_in_its_name_is_a_folder_when_it_exists(tmp_path):
    (tmp_path / "v1.2").mkdir()
    assert output_paths(tmp_path / "v1.2", 1) == [tmp_path / "v1.2" / "00.png"]


def test_hundreds_of_pictures_sort_by_name():
    names = [p.name for p in output_paths("out", 120)]
    assert names == sorted(names)
    assert names[0] == "000.png"


def test_bad_places_are_refused_in_one_line(tmp_path):
    with pytest.raises(KitError, match=r"cannot write pictures as '\.gifx' .*choose from \.png"):
        pictures(1).save(tmp_path / "a.gifx")
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="cannot write"):
        pictures(1).save(tmp_path / "file" / "a.png")

"""The repeated blocks of every architecture."""

from __future__ import annotations

import pytest
from networks import make
from torch import nn

from imagen_kit.errors import KitError
from imagen_kit.performance.regions import blocks


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("unet", {"Unit": 7}),
        ("adm", {"Unit": 11, "ResBlock": 2}),
        ("dit", {"DiTBlock": 3}),
        ("pixart", {"PixArtBlock": 3}),
        ("mmdit", {"JointBlock": 3}),
        ("flux", {"DoubleBlock": 2, "SingleBlock": 2}),
        ("uvit", {"UViTBlock": 5}),
    ],
)
def test_blocks_are_found(name, kinds):
    found = [type(block).__name__ for block in blocks(make(name))]
    assert {kind: found.count(kind) for kind in found} == kinds


def test_a_network_may_say_its_blocks_itself():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Linear(2, 2))

        def repeated_blocks(self):
            return [self.one]

    own = Own()
    assert blocks(own) == [own.one]


def test_a_network_without_blocks():
    with pytest.raises(KitError, match=r"Sequential has no repeated blocks \(compile: whole needs none\)"):
        blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

"""Rules move numbers about and lose none: forth and back gives the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagen_kit.checkpoints.rules import (
    Concat,
    Ignore,
    Rename,
    Reshape,
    Split,
    SwapHalves,
    Transform,
    plan,
    to_foreign,
    to_ours,
)
from imagen_kit.errors import KitError


def pack(q, k, v):
    """Heads next to each other: [head][q, k, v][width], two heads."""
    return torch.stack([x.unflatten(0, (2, -1)) for x in (q, k, v)], 1).flatten(0, 2)


def unpack(x):
    return [part.flatten(0, 1) for part in x.unflatten(0, (2, 3, -1)).unbind(1)]


RULES = [
    Rename("down_blocks.{i}.resnets.{j}.{part}.{end}", "down.{i}.{j}.{part}.{end}"),
    Rename("down_blocks.{i}.{rest}", "down.{i}.other.{rest}"),
    Concat(["a.{i}.q.{end}", "a.{i}.k.{end}", "a.{i}.v.{end}"], "attn.{i}.qkv.{end}"),
    Concat(["c.x", "c.y"], "c.xy", dim=1, sizes=[1, 3]),
    Split("kv", ["k", "v"]),
    Reshape("conv.weight", "linear.weight", (0, 0, 1, 1), (0, 0)),
    SwapHalves("final.{end}", "last.{end}"),
    Transform(["h.q", "h.k", "h.v"], "h.qkv", pack, unpack),
    Ignore("ids.{i}"),
    Ignore("table", make=lambda: torch.arange(4.0)),
]
SHAPES = {
    "down_blocks.0.resnets.11.conv1.weight": (2, 3),
    "down_blocks.10.attentions.0.norm.weight": (3,),
    **{f"a.{i}.{part}.{end}": (4, 2) for i in (0, 12) for part in "kqv" for end in ("weight", "bias")},
    "c.x": (2, 1),
    "c.y": (2, 3),
    "kv": (6, 2),
    "conv.weight": (5, 4, 1, 1),
    "final.weight": (6, 2),
    "h.q": (4, 3),
    "h.k": (4, 3),
    "h.v": (4, 3),
    "untouched.name": (2,),
}


def tensors(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@given(seed=st.integers(0, 100))
def test_there_and_back(seed):
    file = {**tensors(seed), "table": torch.arange(4.0)}
    ours = to_ours(RULES, {**file, "ids.3": torch.zeros(1)})
    back = to_foreign(RULES, ours)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)


def test_names_and_values():
    file = tensors(0)
    ours = to_ours(RULES, file)
    assert torch.equal(ours["down.0.11.conv1.weight"], file["down_blocks.0.resnets.11.conv1.weight"])
    assert torch.equal(
        ours["down.10.other.attentions.0.norm.weight"], file["down_blocks.10.attentions.0.norm.weight"]
    )
    assert torch.equal(ours["attn.12.qkv.bias"], torch.cat([file[f"a.12.{p}.bias"] for p in "qkv"]))
    assert torch.equal(ours["c.xy"], torch.cat([file["c.x"], file["c.y"]], 1))
    assert torch.equal(ours["k"], file["kv"][:3])
    assert ours["linear.weight"].shape == (5, 4)
    assert torch.equal(ours["last.weight"], torch.cat([file["final.weight"][3:], file["final.weight"][:3]]))
    assert torch.equal(ours["h.qkv"][2:4], file["h.k"][:2])
    assert torch.equal(ours["untouched.name"], file["untouched.name"])
    assert "ids.3" not in ours
    assert len(ours) == 13


def test_renaming_copies_nothing():
    file = tensors(0)
    ours = to_ours(RULES, file)
    moved = ("down.0.11.conv1.weight", "down_blocks.0.resnets.11.conv1.weight")
    for here, there in (moved, ("linear.weight", "conv.weight"), ("untouched.name",) * 2):
        assert ours[here].data_ptr() == file[there].data_ptr()


def test_an_exact_name_goes_before_a_template_and_the_first_template_before_the_next():
    rules = [Rename("x.{rest}", "wide.{rest}"), Rename("x.{i}.b", "never.{i}"), Rename("x.1.b", "exact")]
    one = torch.ones(1)
    assert to_ours(rules, {"x.1.b": one, "x.2.b": one}).keys() == {"exact", "wide.2.b"}


def test_placeholders_of_one_letter_are_numbers():
    rules = [Rename("x.{i}.b", "y.{i}"), Rename("x.{word}.c", "z.{word}")]
    one = torch.ones(1)
    assert to_ours(rules, {"x.n.b": one, "x.12.b": one, "x.n.m.c": one, "x.nm.c": one}).keys() == {
        "x.n.b",
        "y.12",
        "x.n.m.c",
        "z.nm",
    }


def test_faults_name_the_tensors():
    with pytest.raises(KitError, match=r"missing tensors a\.0\.k\.weight, which make attn\.0\.qkv\.weight"):
        to_ours(RULES, {"a.0.q.weight": torch.ones(2), "a.0.v.weight": torch.ones(2)})
    with pytest.raises(KitError, match=r"cannot be rearranged.*: kv \(3, 2\)"):
        to_ours(RULES, {"kv": torch.ones(3, 2)})


def test_plans_need_no_memory():
    meta = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    shapes = {name: tuple(t.shape) for name, t in to_ours(RULES, meta).items()}
    assert shapes == {name: tuple(t.shape) for name, t in to_ours(RULES, tensors(0)).items()}
    assert [step.sources for step in plan(RULES, ["c.y"])] == [("c.x", "c.y")]

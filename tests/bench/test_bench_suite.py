"""Suites: grids, conditions, tiny forms, inclusion; what is wrong is one plain line; those that are shipped."""

from __future__ import annotations

import re

import pytest
import torch

from imagen_kit.bench import engine, suite
from imagen_kit.bench.subject import Case
from imagen_kit.errors import KitError

CPU = torch.device("cpu")
SHIPPED = ("quick", "cpu", "gpu", "full")


def load(tmp_path, text, tiny=False, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return suite.load(path, CPU, tiny)


def test_lists_multiply_and_the_last_option_varies_fastest(tmp_path):
    found = load(
        tmp_path,
        """
        protocol: {least: 4, seconds: 0.5}
        processes: one
        cases:
          - kind: denoiser
            name: [dit, uvit]
            options: {batch: [1, 8], dtype: fp32, network: {levels: [1, 2]}, set: [[a, b]]}
        """,
    )
    assert [(c.name, c.options["batch"]) for c in found.cases] == [
        ("dit", 1),
        ("dit", 8),
        ("uvit", 1),
        ("uvit", 8),
    ]
    assert found.cases[0].options == {
        "batch": 1,
        "dtype": "fp32",
        "network": {"levels": [1, 2]},
        "set": ["a", "b"],
    }
    assert (found.name, found.one_process) == ("mine", True)
    assert (found.protocol.least, found.protocol.seconds) == (4, 0.5)


def test_ids_are_stable_whatever_the_order_of_options():
    one, two = (
        Case("a", "b", {"x": 1, "m": {"q": 2, "p": True}}),
        Case("a", "b", {"m": {"p": True, "q": 2}, "x": 1}),
    )
    assert one.id == two.id == 'a/b/m={"p": true, "q": 2},x=1'
    assert Case("a", "b").id == one.group == "a/b"


def test_a_row_that_two_entries_name_is_measured_once(tmp_path):
    found = load(tmp_path, "cases: [{kind: k, name: [a, b]}, {kind: k, name: [b, c]}]")
    assert [case.name for case in found.cases] == ["a", "b", "c"]


def test_conditions(tmp_path):
    text = """
    when: {%s}
    cases:
      - {kind: k, name: here, when: {device: cpu}}
      - {kind: k, name: gpu, when: {device: cuda}}
      - {kind: k, name: huge, when: {memory: 1.0e+9}}
      - {kind: k, name: any}
    """
    assert [case.name for case in load(tmp_path, text % "").cases] == ["here", "any"]
    assert [case.name for case in load(tmp_path, text % "device: cuda").cases] == ["here"]
    assert load(tmp_path, text % "memory: 1.0e+9").cases == []


def test_tiny_forms_take_the_place_of_entries_on_any_device(tmp_path):
    text = """
    when: {device: cuda}
    cases:
      - kind: k
        name: large
        options: {batch: [64, 256], dtype: bf16}
        tiny: {name: small, options: {batch: 1}}
      - {kind: k, name: same}
    """
    assert load(tmp_path, text).cases == []
    found = load(tmp_path, text, tiny=True).cases
    assert [(c.name, dict(c.options)) for c in found] == [
        ("small", {"batch": 1, "dtype": "bf16"}),
        ("same", {}),
    ]


def test_suites_include_others_with_their_conditions(tmp_path):
    (tmp_path / "one.yaml").write_text("when: {device: cuda}\ncases: [{kind: k, name: far}]")
    (tmp_path / "two.yaml").write_text("cases: [{kind: k, name: near}]")
    found = load(tmp_path, "include: [one.yaml, two.yaml]\ncases: [{kind: k, name: own}]")
    assert [case.name for case in found.cases] == ["near", "own"]
    (tmp_path / "two.yaml").write_text("include: [mine.yaml]")
    with pytest.raises(KitError, match="includes this one in turn"):
        load(tmp_path, "include: [two.yaml]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases: [{kind: k, nam: x}]", "cases.0.nam: unknown key; did you mean 'name'"),
        ("cases: [{kind: k}]", "cases.0.name: is missing"),
        ("case: []", "case: unknown key; did you mean 'cases'"),
        ("protocol: {repeats: 3}", "protocol: unknown key 'repeats'"),
        ("processes: two", "processes: must be 'one' or 'model', not 'two'"),
        ("cases: [{kind: k, name: a, when: {device: tpu}}]", "cases.0.when.device: must be 'cpu' or 'cuda'"),
        ("[]", "is not a map of keys"),
        ("a: [", "line 1"),
    ],
)
def test_what_is_wrong_is_one_plain_line(tmp_path, text, said):
    with pytest.raises(KitError, match=re.escape(said)) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unknown_suites_name_the_nearest():
    with pytest.raises(KitError, match="unknown suite 'quik'; did you mean 'quick'"):
        suite.load("quik", CPU)


def test_only_takes_parts_and_patterns(tmp_path):
    found = load(tmp_path, "cases: [{kind: k, name: [dit, unet], options: {batch: [1, 8]}}]")
    assert [case.id for case in found.only("dit").cases] == ["k/dit/batch=1", "k/dit/batch=8"]
    assert [case.id for case in found.only("k/*/batch=8").cases] == ["k/dit/batch=8", "k/unet/batch=8"]
    with pytest.raises(KitError, match="no row matches 'unett'; did you mean 'unet'"):
        found.only("unett")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_of_the_shipped_suites_can_be_built(name):
    """On a CPU, and in the tiny form those for a GPU."""
    assert name in suite.names()
    engine.validate(suite.load(name, CPU).cases)
    tiny = suite.load(name, CPU, tiny=True)
    assert tiny.cases
    engine.validate(tiny.cases)
    spec = suite._read(suite.find(name))
    engine.validate(case for entry in spec.cases for case in entry.cases())


def test_the_suite_for_a_gpu_asks_for_nothing_of_another_device():
    assert suite.load("gpu", CPU).cases == []


def test_suites_travel_in_the_wheel(tmp_path, monkeypatch):
    """Inside of the package where they were put into a wheel, beside it in a checkout."""
    package = tmp_path / "imagen_kit"
    (package / "bench").mkdir(parents=True)
    monkeypatch.setattr(suite, "__file__", str(package / "bench" / "suite.py"))
    assert suite.shipped_folder() == tmp_path / "benchmarks" / "suites"
    (package / "suites").mkdir()
    assert suite.shipped_folder() == package / "suites"

"""``imagen-kit bench`` from the command line."""

from __future__ import annotations

import json

import pytest

from imagen_kit.bench import engine, store
from imagen_kit.bench.measure import OK, blank
from imagen_kit.cli import main


@pytest.fixture
def by_hand(monkeypatch):
    """Rows come without work; the plan that was run is kept."""
    plans = []

    class Hand:
        def __init__(self, plan, results):
            plans.append(plan)
            results.content["ceilings"] = {"matmul": {}, "copy": {"bytes": 1e9, "size": 1}}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def measure(self, case, limit):
            return blank(case, OK) | {"entries": {"imagen_kit": {"status": "skipped", "reason": "by hand"}}}

    monkeypatch.setattr(engine, "Crew", Hand)
    return plans


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "bench takes recipes, --suite, --compare, --roofline or --growth, one of them; given: nothing"),
        (["tiny", "--suite", "quick", "-o", "x"], "given: --suite and recipes"),
        (["--suite", "quik", "-o", "x"], "unknown suite 'quik'; did you mean 'quick'?"),
        (["--suite", "quick"], "bench needs -o DIR or FILE.json"),
        (["--suite", "gpu", "--device", "cpu", "-o", "x"], "suite gpu has no row for a cpu device"),
        (["--suite", "quick", "--only", "recip/", "-o", "x"], "no row matches 'recip/'"),
        (["--suite", "quick", "--repeats", "1", "-o", "x"], "--repeats must be at least 2, not 1"),
        (["--suite", "quick", "--budget", "0", "-o", "x"], "--budget must be more than 0 seconds, not 0"),
        (["--suite", "quick", "--dtype", "bf16", "-o", "x"], "--dtype is for recipes; a suite has its own"),
        (["--suite", "quick", "--set", "a=b", "-o", "x"], "--set is for recipes; a suite has its own"),
        (["--growth", "x", "--fresh"], "--fresh is for measuring; leave it out"),
        (["--compare", "a", "b", "--dry-run"], "--dry-run is for measuring; leave it out"),
        (["tinny", "-o", "x"], "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["tiny", "--weights", "randm", "-o", "x"], "unknown choice 'randm'; did you mean 'random'?"),
        (["tiny", "--dtype", "fp31", "-o", "x"], "--dtype: unknown precision 'fp31'"),
        (["--roofline", "absent.json"], "--roofline needs -o FILE.png"),
        (["--roofline", "absent.json", "-o", "x.txt"], "-o must be a .png, .pdf or .svg file"),
        (["--growth", "absent.json"], "cannot be read: No such file"),
        (["--compare", "a.json", "b.json"], "cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert said in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [3, [{}], [[]]])
@pytest.mark.parametrize("words", [["--growth"], ["--roofline", "-o", "a.png"], ["--compare", "r.json"]])
def test_damaged_results_are_one_line(rows, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outline = {"rows": rows, "environment": {}, "protocol": {}}
    (tmp_path / "r.json").write_text(json.dumps(outline))
    assert main(["bench", words[0], "r.json", *words[1:]]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_dry_run_lists_the_rows(capsys, tmp_path):
    assert main(["bench", "--suite", "quick", "--only", "sampler", "--dry-run", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "sampler/dpmpp_2m/resolution=16,steps=10\n"


def test_a_suite_is_run_and_its_table_printed(by_hand, capsys, tmp_path):
    words = [
        "bench",
        "--suite",
        "quick",
        "--only",
        "t5",
        "-o",
        str(tmp_path),
        "--repeats",
        "4",
        "--device",
        "cpu",
    ]
    assert main([*words, "--budget", "100"]) == 0
    (plan,) = by_hand
    assert (plan.protocol.least, plan.protocol.most, plan.budget, plan.suite) == (4, 4, 100.0, "quick")
    told = capsys.readouterr()
    assert told.err.startswith("1/1 text_encoder/t5")
    assert "ceilings: copy 1.00 GB/s" in told.out
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["kind"] for row in content["rows"]] == ["text_encoder"]
    assert store.read(tmp_path) == content
    by_hand.clear()
    assert main(words) == 0  # nothing is left to do
    assert by_hand == []


def test_recipes_are_measured_whole_and_in_parts(by_hand, capsys, tmp_path):
    file = tmp_path / "r.json"
    assert main(["bench", "tiny", "--weights", "random", "-o", str(file), "--device", "cpu"]) == 0
    kinds = [row["kind"] for row in json.loads(file.read_text())["rows"]]
    assert sorted(set(kinds)) == ["denoiser", "recipe", "text_encoder"]


def test_results_of_another_machine_are_refused(by_hand, capsys, tmp_path):
    words = ["bench", "--suite", "quick", "--only", "t5", "-o", str(tmp_path / "r.json"), "--device", "cpu"]
    assert main(words) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    content["environment"]["device"] = "Abacus"
    (tmp_path / "r.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(words) == 2
    assert "was made with device = 'Abacus'" in capsys.readouterr().err
    assert main([*words, "--fresh"]) == 0


def test_results_are_compared_with_themselves(by_hand, capsys, tmp_path):
    file = str(tmp_path / "r.json")
    main(["bench", "--suite", "quick", "--only", "t5", "-o", file, "--device", "cpu"])
    capsys.readouterr()
    assert main(["bench", "--compare", file, file]) == 0
    assert capsys.readouterr().out.startswith("same environment and protocol\n")

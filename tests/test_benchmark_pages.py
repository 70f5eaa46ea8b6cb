"""The generated parts of benchmarks/README.md and of the README's section on throughput."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import benchmark_pages

    monkeypatch.setattr(benchmark_pages.roofline, "draw", lambda content, file: None)
    yield benchmark_pages
    sys.modules.pop("benchmark_pages", None)


def entry(seconds):
    return {
        "status": "ok",
        "seconds": {"median": seconds, "quartiles": [seconds, seconds]},
        "per_second": 1 / seconds,
        "unit": "pictures",
        "tflops": 0.1,
        "flops": 10**9,
        "bytes": 10**7,
        "percent_of_matmul": 50.0,
        "percent_of_copy": 5.0,
        "peak_bytes": 2**20,
        "activation_bytes": 2**19,
        "waits_per_step": 0.0,
        "note": "float32, eager",
    }


def row(kind, name, seconds, theirs, batch):
    return {
        "id": f"{kind}/{name}/batch={batch}",
        "kind": kind,
        "name": name,
        "options": {"batch": batch},
        "status": "ok",
        "reason": "",
        "entries": {"imagen_kit": entry(seconds), "diffusers": entry(theirs)},
        "difference": {"diffusers": {"max_abs": 1e-6, "relative": 3e-6, "rms": 1e-7}},
        "ratio": {"diffusers": theirs / seconds},
        "ratio_quartiles": {"diffusers": [1.0, 2.0]},
    }


@pytest.fixture
def made_up(pages, monkeypatch, tmp_path):
    rows = [row("recipe", "sd15", 1.0 * b, 2.0 * b, b) for b in (1, 2, 4)] + [
        row("denoiser", "dit", 1.0, 0.5, 1)
    ]
    lost = {
        **row("denoiser", "huge", 1.0, 1.0, 9),
        "status": "out of memory",
        "reason": "too large",
        "entries": {},
    }
    versions = {"python": "3.11", "torch": "2"}
    content = {
        "environment": {
            "kind": "cpu",
            "device": "Abacus CPU",
            "threads": 2,
            "versions": versions,
        },
        "ceilings": {"matmul": {"fp32": {"flops": 1e11}}, "copy": {"bytes": 1e10}},
        "protocol": {},
        "date": "2026-01-02T00:00:00",
        "seconds": 90.0,
        "rows": [*rows, lost],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    return pages


def test_the_readme_tells_how_rows_stand_beside_diffusers(made_up):
    told = made_up.throughput()
    assert (
        "- Whole recipes: diffusers takes 2.00× our time (median of 3 rows, 2.00× to 2.00×; not slower in 3), "
        "largest difference 3e-06 of the rms"
    ) in told
    assert "takes 0.50× our time (median of 1 rows, 0.50× to 0.50×; not slower in 0)" in told
    assert (
        "| recipe `sd15` batch 1 | 1.00 s ±0% | 1.00 pictures | 50.0 | diffusers: 2.00× (Δ 1e-06) |" in told
    )
    assert told.count("| recipe `sd15`") == 1  # the one with most pictures a second
    assert "Not measured yet: `python benchmarks/gpu.py -o benchmarks/results/gpu.json`" in told


def test_the_page_has_every_row_the_lost_ones_too(made_up):
    told = made_up.tables()
    assert "### Whole recipes: Abacus CPU" in told
    assert "| `sd15` batch 4 | 4.00 s ±0% |" in told
    assert "- `denoiser/huge/batch=9`: out of memory, too large" in told
    assert "1.5 minutes" not in made_up.surroundings()
    assert "Rows: 4 ok, 1 out of memory; 2 minutes." in made_up.surroundings()
    assert "| recipe sd15 | batch | imagen_kit | time | 1-4 (3) | 1.00 | 1.000 | 1.00 |" in made_up.curves()
    assert "results/roofline-cpu.png" in made_up.pictures()


@pytest.mark.parametrize("name", ["surroundings", "tables", "curves", "paper", "pictures"])
def test_the_page_is_up_to_date(pages, name):
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- end -->", text, re.S).group(1)
    assert shown.rstrip("\n") == getattr(pages, name)(), "run: python docs/update_readme.py"


def test_the_readme_is_up_to_date(pages):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- throughput: .*? -->\n(.*?)<!-- end -->", text, re.S).group(1)
    assert shown.rstrip("\n") == pages.throughput(), "run: python docs/update_readme.py"


def test_pictures_that_the_page_names_are_there():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "benchmarks" / path).is_file(), path

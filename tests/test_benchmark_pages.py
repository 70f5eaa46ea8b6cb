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
    assert told.count("| recipe `sd15`") == 3  # one of each batch
    assert "Not measured yet: `python benchmarks/gpu.py -o benchmarks/results/gpu.json`" in told


def gain(name, seconds, without, option, **options):
    made = row("gain", name, seconds, without, 1)
    made["options"] = {"option": option, **options}
    made["id"] = f"gain/{name}/{json.dumps(option)}{options}"
    made["entries"] = {"imagen_kit": entry(seconds), "without": entry(without)}
    made["difference"] = {"without": {"max_abs": 2e-2, "relative": 3e-2, "rms": 1e-3}}
    made["ratio"] = {"without": without / seconds}
    return made


def results(path, name, rows, device="Abacus CPU"):
    content = {
        "environment": {
            "kind": name,
            "device": device,
            "threads": 2,
            "versions": {"python": "3", "torch": "2"},
        },
        "protocol": {},
        "date": "2026-01-02T00:00:00",
        "seconds": 9.0,
        "rows": rows,
    }
    (path / f"{name}.json").write_text(json.dumps(content))


def test_what_options_gain_is_not_measured_yet(made_up):
    told = made_up.gains()
    assert (
        "Not measured yet: `imagen-kit bench --suite cpu -o benchmarks/results/cpu.json --only gain/`" in told
    )
    assert "|" not in told


def test_a_line_for_each_option(made_up, tmp_path):
    interval = {"guidance": [{"name": "cfg", "scale": 2.0, "interval": [0.3, 3.0]}]}
    rows = [
        gain("sd15", 0.5, 1.0, {"dtype": "bf16"}, batch=1),
        gain("sd15", 0.5, 0.8, interval, peers="diffusers"),
        gain("dit", 0.25, 1.0, {"dtype": "bf16"}, batch=4),
        {
            **gain("dit", 1.0, 1.0, {"attention": "flash"}),
            "status": "skipped",
            "reason": "not here",
            "entries": {},
        },
    ]
    ours, other = (rows[1]["entries"][who] for who in ("imagen_kit", "without"))
    ours["flops"], other["flops"], other["peak_bytes"] = 75 * 10**8, 10**10, 3 * 2**20
    rows[1]["ratio"]["diffusers"] = 1.75
    results(tmp_path, "cpu", rows)
    unmeasured = " | not measured |"
    lines = made_up.gains().splitlines()
    assert lines[2:6] == [
        "| dtype bf16 | `sd15` batch 1 | 1.00 s → 500 ms | 2.00× | 1.00 GFLOP | 1.00 | 2e-02 |  | not measured |",
        "| dtype bf16 | `dit` batch 4 | 1.00 s → 250 ms | 4.00× | 1.00 GFLOP | 1.00 | 2e-02 |  | see above |",
        "| guidance cfg (scale 2.0, interval 0.3-3.0) | `sd15` | 800 ms → 500 ms | 1.60× | 10.0 → 7.50 GFLOP "
        "| 3.00 → 1.00 | 2e-02, by design | 1.75× | not measured |",
        "| attention flash | `dit` | skipped: not here |  |  |  |  |  | not measured |",
    ]
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:6])
    assert unmeasured in lines[2]

    there = [gain("sd15", 0.1, 0.3, {"dtype": "bf16"}, batch=1), gain("pocket", 0.1, 0.4, {"graph": True})]
    results(tmp_path, "gpu", there, "Abacus GPU")
    lines = made_up.gains().splitlines()
    assert lines[2].endswith("|  | `sd15` batch 1: 300 ms → 100 ms, 3.00×, peak 1.00 MiB, Δ 2e-02 |")
    assert lines[6].startswith("| graph yes | not measured |")
    assert lines[6].endswith("| `pocket`: 400 ms → 100 ms, 4.00×, peak 1.00 MiB, Δ 2e-02 |")
    assert lines[6].count("|") == lines[0].count("|")
    assert {"Abacus CPU", "Abacus GPU"} <= {
        word.strip() for line in lines[-2:] for word in line.split("·")[1].split(",")
    }

    (tmp_path / "cpu.json").unlink()
    assert "| dtype bf16 | not measured |" in made_up.gains()


def test_recipes_are_shown_at_their_own_number_of_steps(made_up, tmp_path):
    def drawn(name, seconds, **options):
        made = row("recipe", name, seconds, 2 * seconds, options.get("batch", 1))
        made["id"], made["options"] = f"{name}{options}", options
        return made

    rows = [
        drawn("pocket", 0.1, batch=1, steps=5),
        drawn("pocket", 0.4, batch=1),
        drawn("pocket", 0.3, batch=1, dtype="auto"),
        drawn("pocket", 1.0, batch=8),
        drawn("sd15", 0.5, batch=1, steps=6),
    ]
    results(tmp_path, "cpu", rows)
    shown = [
        line.split(" | ")[0] for line in made_up.throughput().splitlines() if line.startswith("| recipe")
    ]
    assert shown == [
        "| recipe `pocket` batch 1, dtype auto",
        "| recipe `pocket` batch 8",
        "| recipe `sd15` batch 1, steps 6",
    ]


def test_networks_are_explained_once(made_up, tmp_path):
    wide = {"width": 64, "depth": 2}
    rows = [row("denoiser", "dit", 1.0 * batch, 2.0, batch) for batch in (1, 2)]
    for made in rows:
        made["options"] |= {"network": wide}
        made["entries"]["imagen_kit"]["parameters"] = 5_440_000
    results(tmp_path, "cpu", rows)
    told = made_up.tables()
    assert told.count("width 64") == 1
    assert "### Networks of the rows: Abacus CPU\n\n- `dit` 5.44 M parameters: depth 2, width 64" in told
    assert "| `dit` batch 2, 5.44 M parameters |" in told


def test_the_page_has_every_row_the_lost_ones_too(made_up):
    told = made_up.tables()
    assert "### Whole recipes: Abacus CPU" in told
    assert "| `sd15` batch 4 | 4.00 s ±0% |" in told
    assert "- `denoiser/huge/batch=9`: out of memory, too large" in told
    assert "1.5 minutes" not in made_up.surroundings()
    assert "Rows: 4 ok, 1 out of memory; 2 minutes." in made_up.surroundings()
    assert "| recipe sd15 | batch | imagen_kit | time | 1-4 (3) | 1.00 | 1.000 | 1.00 |" in made_up.curves()
    assert "results/roofline-cpu.png" in made_up.pictures()


@pytest.mark.parametrize("name", ["surroundings", "gains", "tables", "curves", "paper", "pictures"])
def test_the_page_is_up_to_date(pages, name):
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- end -->", text, re.S).group(1)
    assert shown.rstrip("\n") == getattr(pages, name)(), "run: python docs/update_readme.py"


@pytest.mark.parametrize("name", ["throughput", "gains"])
def test_the_readme_is_up_to_date(pages, name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- end -->", text, re.S).group(1)
    assert shown.rstrip("\n") == getattr(pages, name)(), "run: python docs/update_readme.py"


def test_pictures_that_the_page_names_are_there():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "benchmarks" / path).is_file(), path

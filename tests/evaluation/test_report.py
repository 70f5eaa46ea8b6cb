"""The page holds everything itself, gives back the numbers it was made from, and draws itself."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from gaussian_model import pipeline, subject

from imagen_kit.evaluation import compare, report, summary
from imagen_kit.evaluation.spec import make_entries

BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
CHROMIUM = next(filter(None, BROWSERS), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    what = subject(pipeline(), n=2)
    entries = make_entries(["ddim", "heun", "euler_ancestral"], what.keep())
    settings = {"reference": "dpmpp_3m@12", "seeds": [0, 1], "guidance": [None, 1.0]}
    compare.run(what, entries, [2, 4], out, **settings, targets=["rmse=0.2", "psnr=20"])
    return out


def embedded(page: str) -> dict:
    """What the page's scripts read, taken out as they take it out."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_page_asks_the_network_for_nothing(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    outside = re.sub(r'"data:image/\w+;base64,[A-Za-z0-9+/=]*"', '""', page)
    for mark in (
        "http:",
        "https:",
        " src=",
        "@import",
        "url(//",
        '<link rel="stylesheet',
        "fetch(",
        "XMLHttp",
    ):
        assert mark not in outside, mark
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert re.findall(r'href="([^"]*)"', page) == ["data:,", "#table-title"]


def test_the_numbers_come_back(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = embedded((folder / "report.html").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(report.data(results)))
    assert found["results"] == results
    assert len(found["points"]) == 3 * 2 * 2
    assert list(found["costs"])[:3] == ["nfe", "evaluations_per_picture", "seconds_per_picture"]


def test_no_text_of_the_results_can_end_the_script_or_the_title(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    evil = "</script><script>alert('{{data}}')</script><!-- 上方 & {{style}}"
    results["settings"]["subject"] = evil
    results["references"][0]["captions"] = [evil]
    page = report.render(results)
    assert page.count("<script") == 2  # the data and the page's own
    assert "alert('{{data}}')" not in re.search(r"<title>(.*?)</title>", page, re.S)[1].replace("&#x27;", "")
    assert embedded(page)["results"] == results
    assert html.escape(evil) in page


def browse(path, fragment="", *flags) -> tuple[str, str]:
    """(the page after its scripts have run, what the console said)."""
    command = [CHROMIUM, *FLAGS, *flags, "--dump-dom", f"file://{path}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(said)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
class TestInABrowser:
    @pytest.fixture(scope="class")
    def page(self, folder):
        return browse(folder / "report.html")

    def test_it_draws_itself_without_a_complaint(self, page, folder):
        dom, said = page
        assert said == ""
        assert 'data-ready="true"' in dom
        assert re.search(r'<p id="fault"[^>]*hidden', dom)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        points = summary.points(results)
        table = re.search(r'<table id="table">(.*?)</table>', dom, re.S)[1]
        assert dom.count('class="point"') == len(points) == table.count('<th scope="row">') == 12

    def test_front_and_answer_are_those_of_the_results(self, page, folder):
        dom, _ = page
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        front = summary.pareto(summary.points(results), "nfe", "rmse", "lower")

        def key(point):
            scale = "own" if point["guidance"] is None else f"{point['guidance']:g}"
            return f"{point['sampler']}|{point['steps']}|{scale}"

        drawn = re.findall(r'data-key="([^"]*)" data-front="1"', dom)
        assert sorted(drawn) == sorted(map(key, front))
        answers = [a for a in results["answers"] if a["quality"] == "rmse" and a["sampler"]]
        found = re.search(r'<p id="answer"[^>]*data-key="([^"]*)"', dom)[1]
        assert found in [key(a) for a in answers]
        assert "the cheapest is" in dom

    def test_what_the_address_asks_for_is_shown(self, folder):
        state = "#y=psnr&x=seconds_per_picture&lx=0&off=heun&g=1&sort=psnr&down=1&theme=dark&focus=ddim|4|1"
        dom, said = browse(folder / "report.html", state, "--window-size=400,900")
        assert said == ""
        assert 'data-theme="dark"' in dom
        shown = re.findall(r'data-key="([^"|]*\|[^"]*)" data-front', dom)
        assert {text.split("|")[0] for text in shown} == {"ddim", "euler_ancestral"}
        assert len(shown) == 4
        assert re.search(r'<div id="tip"[^>]*>.*?<b>ddim, 4 steps, guidance 1</b>', dom, re.S)
        assert not re.search(r'<div id="tip"[^>]*hidden', dom)
        table = re.search(r'<table id="table">(.*?)</table>', dom, re.S)[1]
        assert re.search(r'data-key="psnr" aria-sort="descending"', table)
        assert table.count("<tr") == 1 + 4

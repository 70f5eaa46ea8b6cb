"""Tables, comparisons, fitted exponents and pictures of made-up results."""

from __future__ import annotations

import copy
import json

import pytest

from imagen_kit.bench import comparison, growth, roofline, table
from imagen_kit.errors import KitError

PROTOCOL = {"warm_up": 2, "least": 3}
ENVIRONMENT = {
    "kind": "cpu",
    "device": "Abacus CPU",
    "threads": 1,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
}


def entry(seconds, spread=0.01, **more):
    quartiles = [seconds * (1 - spread), seconds * (1 + spread)]
    found = {
        "status": "ok",
        "seconds": {"median": seconds, "quartiles": quartiles, "least": quartiles[0], "repeats": 5},
        "per_second": 2 / seconds,
        "unit": "evaluations",
        "peak_bytes": 3 * 2**20,
        "activation_bytes": 2**20,
        "flops": 10**9,
        "tflops": 1e-3 / seconds,
        "percent_of_matmul": 12.34,
        "bytes": 10**7,
        "percent_of_copy": 5.0,
        "waits_per_step": 0.25,
        "note": "float32, eager",
        "precision": "fp32",
    }
    return {**found, **more}


def row(name, ours, peers=None, kind="denoiser", status="ok", **options):
    told = ",".join(f"{key}={options[key]}" for key in sorted(options))
    entries = {"imagen_kit": ours, **(peers or {})} if ours else {}
    return {
        "id": f"{kind}/{name}/{told}",
        "kind": kind,
        "name": name,
        "options": options,
        "status": status,
        "reason": "",
        "entries": entries,
        "difference": {"diffusers": {"max_abs": 2.1e-7, "relative": 1e-7, "rms": 1e-8}} if peers else {},
        "ratio": {"diffusers": 1.5} if peers else {},
        "ratio_quartiles": {"diffusers": [1.4, 1.6]} if peers else {},
    }


def content(*rows):
    tops = {"matmul": {"fp32": {"flops": 1e11}, "bf16": {"flops": 2e11}}, "copy": {"bytes": 2e10}}
    return {
        "environment": copy.deepcopy(ENVIRONMENT),
        "protocol": dict(PROTOCOL),
        "ceilings": tops,
        "date": "2026-01-02T03:04:05+00:00",
        "rows": list(rows),
    }


def saved(path, *rows, **environment):
    made = content(*rows)
    made["environment"].update(environment)
    path.write_text(json.dumps(made))
    return path


class TestTable:
    def test_numbers_have_three_digits(self):
        given = (0, 0.0004, 0.0123, 1.0, 12.345, 999.6, 1234.5, 125_432.0)
        assert [table.number(value) for value in given] == [
            *("0", "4.0e-04", "0.0123", "1.00", "12.3", "1000", "1230", "125000")
        ]
        assert table.number(None) == ""

    def test_durations_choose_their_unit(self):
        given = (12.0, 1.0, 0.5, 0.00321, 4.5e-6, 7.2e-8)
        assert [table.duration(value) for value in given] == [
            *("12.0 s", "1.00 s", "500 ms", "3.21 ms", "4.50 µs", "72.0 ns")
        ]

    def test_a_row_with_a_peer_tells_ratio_and_difference(self):
        cells = table.lines(row("dit", entry(0.01), {"diffusers": entry(0.015)}, batch=2))
        assert cells == [
            "10.0 ms ±1%",
            "200 evaluations",
            "0.100",
            "12.3",
            "5.00",
            "3.00",
            "0.250",
            cells[-1],
        ]
        assert cells[-1] == "diffusers: 1.50× (Δ 2e-07)"

    def test_a_missing_peer_and_a_row_out_of_memory_say_so(self):
        absent = {"diffusers": {"status": "skipped", "reason": "diffusers is not installed"}}
        assert table.lines(row("dit", entry(0.01), absent))[-1] == "diffusers: skipped"
        lost = {**row("dit", None, status="out of memory"), "reason": "CUDA out of memory"}
        assert table.lines(lost)[0] == "out of memory"
        assert table.lines(lost)[-1] == "CUDA out of memory"

    def test_shared_options_stand_above(self):
        rows = [row("dit", entry(0.01), batch=b, dtype="fp32", mode="eager") for b in (1, 2)]
        told = table.markdown(rows).splitlines()
        assert told[0] == "All with dtype fp32, mode eager."
        assert told[4].startswith("| `dit` batch 1 | 10.0 ms ±1% |")
        assert len({line.count("|") for line in told[2:]}) == 1
        assert "denoiser: all with dtype fp32, mode eager" in table.screen(rows)

    def test_networks_are_told_by_their_size_and_explained_once(self):
        wide, deep = {"width": 64, "depth": 2}, {"width": 32, "depth": 8}
        rows = [
            row("dit", entry(0.01, parameters=5_440_000), network=wide, batch=1),
            row("dit", entry(0.02, parameters=5_440_000), network=wide, batch=2),
            row("dit", entry(0.02, parameters=5_440_000), network=deep, batch=2),
            row("kl", entry(0.02, parameters=900), options={"blocks": 1}, batch=2),
            row("dit", None, status="out of memory", network=wide, batch=512),
        ]
        sizes = table.sizes(rows)
        assert [table.label(r, mark="`", sizes=sizes) for r in rows] == [
            "`dit` 5.44 M parameters, batch 1",
            "`dit` 5.44 M parameters, batch 2",
            "`dit` 5.44 M parameters (variant 2), batch 2",
            "`kl` 900 parameters, batch 2",
            "`dit` 5.44 M parameters, batch 512",
        ]
        assert table.legend(rows, "`") == [
            "`dit` 5.44 M parameters: depth 2, width 64",
            "`dit` 5.44 M parameters (variant 2): depth 8, width 32",
            "`kl` 900 parameters: blocks 1",
        ]
        assert (
            table.label(rows[0]) == "dit network (width 64, depth 2), batch 1"
        )  # of a row that nothing explains
        alone = table.markdown(rows[:2], rows)
        assert "| `dit` 5.44 M parameters, batch 1 |" in alone
        assert table.screen(rows).endswith("kl 900 parameters: blocks 1")

    def test_parameters_have_their_unit(self):
        given = (17, 2_500, 32_900_000, 2_310_000_000)
        assert [table.parameters(count) for count in given] == [
            *("17 parameters", "2.50 k parameters", "32.9 M parameters", "2.31 B parameters")
        ]

    def test_parts_are_told_by_their_names(self):
        told = {
            "guidance": [
                {"name": "interval", "of": {"name": "cfg", "scale": 2.0}, "low": 0.5},
                {"name": "apg"},
            ],
            "set": ["stages.0.size=16", "stages.base.sampler=ddim"],
            "graph": True,
        }
        assert table.pairs(told) == (
            "guidance interval (of cfg (scale 2.0), low 0.5) + apg, set size=16 stages.base.sampler=ddim, graph yes"
        )

    def test_columns_are_aligned(self):
        told = table.aligned([["a", "bb", "c"], ["long", "1", "d"]]).splitlines()
        assert told == ["a     bb  c", "long   1  d"]

    def test_surroundings(self):
        assert (
            table.environment(content()) == "Abacus CPU, 1 thread(s), Python 3.11.7, torch 2.15.0, 2026-01-02"
        )
        assert table.ceilings(content()) == "fp32 0.100 TFLOP/s, bf16 0.200 TFLOP/s, copy 20.0 GB/s"
        assert table.ceilings({"ceilings": None}) == "not measured"


class TestComparison:
    def test_what_differs_beyond_its_spread_comes_first(self, tmp_path):
        before = saved(tmp_path / "a.json", *(row(n, entry(0.01, 0.05)) for n in ("same", "fast", "slow")))
        times = {"same": 0.0105, "fast": 0.005, "slow": 0.03}
        after = saved(tmp_path / "b.json", *(row(n, entry(s, 0.05)) for n, s in times.items()))
        changes = comparison.changes(json.loads(before.read_text()), json.loads(after.read_text()))
        assert [(c.id.split("/")[1], c.beyond) for c in changes] == [
            ("slow", True),
            ("fast", True),
            ("same", False),
        ]
        assert changes[0].ratio == pytest.approx(3.0)
        assert (changes[0].low, changes[0].high) == pytest.approx((3 * 0.95 / 1.05, 3 * 1.05 / 0.95))
        assert changes[0].memory == 1.0
        told = comparison.compare(before, after)
        assert told.startswith("same environment and protocol\n")
        assert "3 rows in both: 1 faster and 1 slower beyond their spread, 1 within it" in told
        assert f"geometric mean) {(3.0 * 0.5 * 1.05) ** (1 / 3):.2f}" in told

    def test_other_surroundings_and_rows_of_one_file_are_told(self, tmp_path):
        before = saved(tmp_path / "a.json", row("dit", entry(0.01)), row("old", entry(0.01)))
        lost = row("dit", None, status="out of memory")
        after = saved(tmp_path / "b.json", lost, threads=2)
        told = comparison.compare(before, after)
        assert told.startswith("differences of the environment:\n  environment threads: 1 -> 2\n")
        assert "0 rows in both" in told
        assert "denoiser/dit/: ok -> out of memory" in told
        assert "denoiser/old/: ok -> not there" in told

    def test_files_that_are_not_results(self, tmp_path):
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(KitError, match="is not a results file"):
            comparison.compare(tmp_path / "a.json", tmp_path / "a.json")
        with pytest.raises(KitError, match="cannot be read: No such file"):
            comparison.compare(tmp_path / "c.json", tmp_path / "a.json")


class TestGrowth:
    @pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0, 4.0])
    def test_exact_power_laws(self, exponent):
        slope, r2, last = growth.fit([(x, 7.0 * x**exponent) for x in (1, 2, 3, 8)])
        assert slope == pytest.approx(exponent, abs=1e-12)
        assert r2 == pytest.approx(1.0)
        assert last == pytest.approx(exponent, abs=1e-12)

    def test_a_fixed_cost_bends_the_line(self):
        slope, r2, last = growth.fit([(x, 1.0 + x**2) for x in (1, 2, 4, 8, 16)])
        assert slope < last < 2.0
        assert last > 1.95
        assert 0.9 < r2 < 1.0

    def test_rows_that_differ_in_one_number_alone_are_a_curve(self):
        rows = [
            row("dit", entry(2e-3 * b, activation_bytes=100 * b**2), batch=b, resolution=32, mode=mode)
            for b in (1, 2, 4)
            for mode in ("eager", "compile")
        ]
        rows += [row("dit", entry(1.0), batch=8, resolution=64, mode="eager")]  # differs in two
        found = growth.fits(rows)
        assert len(found) == 2 * 3  # two modes, three quantities
        times = [curve for curve in found if curve.quantity == "time"]
        assert [curve.fixed["mode"] for curve in times] == ["eager", "compile"]
        assert all(curve.axis == "batch" and curve.exponent == pytest.approx(1.0) for curve in times)
        assert times[0].points == ((1.0, 2e-3), (2.0, 4e-3), (4.0, 8e-3))
        memory = [curve.exponent for curve in found if curve.quantity == "memory beyond weights"]
        assert memory == pytest.approx([2.0, 2.0])

    def test_peers_have_curves_of_their_own_and_failures_are_no_points(self):
        rows = [row("dit", entry(1e-3 * s), {"diffusers": entry(1e-3 * s**2)}, steps=s) for s in (5, 10, 20)]
        rows.append(row("dit", None, status="out of memory", steps=40))
        found = {(curve.who, curve.quantity): curve.exponent for curve in growth.fits(rows)}
        assert found["imagen_kit", "time"] == pytest.approx(1.0)
        assert found["diffusers", "time"] == pytest.approx(2.0)

    def test_networks_are_told_by_their_size(self):
        options = {"network": {"width": 64}, "dtype": "fp32"}
        rows = [row("dit", entry(0.1 * b, parameters=2_000_000), batch=b, **options) for b in (1, 2, 4)]
        told = growth.table(growth.fits(rows), table.sizes(rows))
        assert told[1][0] == "denoiser dit dtype fp32, 2.00 M parameters"
        assert growth.table(growth.fits(rows))[1][0] == "denoiser dit dtype fp32, network (width 64)"
        assert "2.00 M parameters" in growth.text(content(*rows))

    def test_two_sizes_are_no_curve(self):
        rows = [row("dit", entry(1e-3 * s), steps=s, causal=True) for s in (5, 10)]
        assert growth.fits(rows) == []
        assert "3 different sizes" in growth.text(content(*rows))

    def test_the_text_has_a_line_for_each_curve(self):
        rows = [row("dit", entry(1e-3 * s), steps=s) for s in (5, 10, 20)]
        told = growth.text(content(*rows)).splitlines()
        assert told[0].split() == [
            "what",
            "grows",
            "with",
            "who",
            "quantity",
            "sizes",
            "exponent",
            "r²",
            "at",
            "the",
            "end",
        ]
        assert told[1].split()[:8] == [
            "denoiser",
            "dit",
            "steps",
            "imagen_kit",
            "time",
            "5-20",
            "(3)",
            "1.00",
        ]


class TestRoofline:
    def drawn(self, *rows):
        return roofline.figure(content(*rows)).axes[0]

    def test_points_lie_at_their_intensity_and_rate(self):
        axes = self.drawn(row("dit", entry(0.02), {"diffusers": entry(0.04)}, batch=2))
        points = [
            (line.get_xdata()[0], line.get_ydata()[0])
            for line in axes.lines
            if line.get_linestyle() == "None" and len(line.get_xdata())
        ]
        assert points == [(100.0, pytest.approx(5e10)), (100.0, pytest.approx(2.5e10))]

    def test_the_roof_meets_the_ceilings(self):
        rows = [row("dit", entry(0.02)), row("uvit", entry(0.02, precision="bf16"))]
        axes = self.drawn(*rows)
        slanted = axes.lines[0]
        (x0, x1), (y0, y1) = slanted.get_xdata(), slanted.get_ydata()
        assert y0 / x0 == pytest.approx(2e10)  # bytes a second
        assert (x1, y1) == pytest.approx((10.0, 2e11))  # where the copy feeds the best product
        told = {text.get_text() for text in axes.texts}
        assert {"copy 20.0 GB/s", "fp32 0.100 TFLOP/s", "bf16 0.200 TFLOP/s"} <= told
        alone = {text.get_text() for text in self.drawn(rows[0]).texts}
        assert not any(word.startswith("bf16") for word in alone)  # no row is computed in it
        assert axes.get_xscale() == axes.get_yscale() == "log"

    def test_rows_without_figures_are_left_out(self, tmp_path):
        rows = [row("dit", entry(0.02)), row("t5", None, status="failed"), row("s", entry(0.1, flops=0))]
        made = content(*rows)
        roofline.draw(made, tmp_path / "r.png")
        assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
        with pytest.raises(KitError, match="nothing to draw"):
            roofline.figure(content(*rows[1:]))
        with pytest.raises(KitError, match="nothing to draw"):
            roofline.figure({**made, "ceilings": None})

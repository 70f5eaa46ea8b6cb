"""Comparison of samplers on models whose exact result is known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from gaussian_model import MEAN, STD, pipeline, subject
from torch import nn

from imagen_kit import guidance, samplers
from imagen_kit.errors import KitError
from imagen_kit.evaluation import compare, summary
from imagen_kit.evaluation.drawing import draw, fingerprint
from imagen_kit.evaluation.features import parse
from imagen_kit.evaluation.measures import Measures
from imagen_kit.evaluation.spec import make_entries
from imagen_kit.evaluation.subjects import AnalyticSubject

REFERENCE = "dpmpp_3m@100"


def run(what, names, counts, out, **settings):
    entries = make_entries(names, what.keep())
    settings = {"reference": "dpmpp_3m@20", **settings}
    return compare.run(what, entries, counts, out, **settings)


def cells(results):
    return {(cell["sampler"], cell["steps"]): cell for cell in results["cells"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    names = ["ddim", "dpmpp_2m", "heun", "euler_ancestral"]
    return out, run(subject(), names, [4, 8, 16], out, reference=REFERENCE)


def test_evaluations_are_counted_at_the_network(finished):
    found = cells(finished[1])
    assert len(found) == 12
    for steps in (4, 8, 16):
        assert found["ddim", steps]["nfe"] == found["dpmpp_2m", steps]["nfe"] == steps
        assert found["heun", steps]["nfe"] == 2 * steps - 1  # the last step, to sigma 0, has no corrector
        assert found["ddim", steps]["nfe_all_stages"] == steps + 2
        assert found["ddim", steps]["evaluations_per_picture"] == steps  # no guidance
    (reference,) = finished[1]["references"]
    assert (reference["nfe"], reference["steps"], reference["seed"]) == (100, 100, 0)


def test_guidance_doubles_the_rows_and_not_the_calls():
    model = pipeline((guidance.create("cfg", scale=2.0),))
    drawn = draw(model, ["a", "b", "c"], [0, 1, 2], samplers.create("ddim"), 4, batch_size=2)
    assert drawn.calls == {"base": 4, "sr": 2}
    assert drawn.rows == {"base": 8.0, "sr": 2.0}


def test_distance_falls_as_the_order_says(finished):
    found = cells(finished[1])
    for name, order in (("ddim", 1), ("dpmpp_2m", 2)):
        errors = [found[name, steps]["rmse"] for steps in (4, 8, 16)]
        assert errors[0] > errors[1] > errors[2] > 0
        # halving the step divides the error by 2^order; half an order of slack, as these are few steps
        assert math.log2(errors[1] / errors[2]) > order - 0.5
    assert found["dpmpp_2m", 16]["rmse"] < found["ddim", 16]["rmse"]
    assert found["dpmpp_2m", 16]["psnr"] > found["ddim", 16]["psnr"]
    assert found["dpmpp_2m", 16]["ssim"] > found["ddim", 16]["ssim"]
    facts = finished[1]["samplers"]
    assert facts["euler_ancestral"]["stochastic"]
    assert not facts["heun"]["stochastic"]
    # fresh noise leads to another picture of the same spread: far from the converged one
    assert found["euler_ancestral", 16]["rmse"] > 0.02
    for cell in found.values():
        assert 0 < cell["rmse_final"] <= cell["rmse"] * 1.01  # enlarging averages neighbours
        assert cell["accuracy"]["all"] == 0  # grey noise is no scene
        assert cell["thumbnails"]["count"] == 4


def test_reference_is_the_exact_solution(finished):
    from safetensors.torch import load_file

    model = pipeline()
    started: list[torch.Tensor] = []
    tableau = samplers.create("dpmpp_3m", spacing="log_snr").tableau(model.stages[0].schedule, 100)
    hook = model.stages[0].denoiser.register_forward_pre_hook(
        lambda module, inputs: started.append(inputs[0].clone())
    )
    draw(model, ["a"] * 5, [0, 1, 2, 3, 4], samplers.create("ddim", spacing="log_snr"), 1)
    hook.remove()
    # The flow of a Gaussian keeps z = (x - alpha mean) / sqrt(alpha² std² + sigma²); the grid follows it to its
    # last time before the end, from where one evaluation leads to sigma = 0.
    alpha, sigma = tableau.start
    z = (started[0] - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)
    alpha, sigma = model.stages[0].schedule.alpha_sigma(tableau.times[-2])
    exact = MEAN + alpha * STD**2 * z / math.sqrt(alpha**2 * STD**2 + sigma**2)
    kept = load_file(finished[0] / "converged" / "guidance-own-seed-0.safetensors")
    assert kept["first"].shape == (5, 3, 16, 16)
    assert kept["final"].shape == (5, 3, 32, 32)
    # in [0, 1]; 100 and 400 steps differ by 5e-5
    assert (kept["first"] - (exact.clamp(-1, 1) + 1) / 2).abs().max() < 2e-4


def test_files(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "tradeoff.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    source = results["provenance"]
    assert source["device"].endswith("CPU")
    assert source["versions"]["torch"] == torch.__version__
    assert source["date"].startswith("20")
    assert source["command"]
    names = sorted(file.name for file in out.iterdir())
    assert names == ["converged", "report.html", "results.json", "tradeoff.png"]


def test_redrawing_needs_the_results_alone(finished, tmp_path):
    for name in ("results.json",):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    compare.redraw(tmp_path)
    for name in ("report.html", "tradeoff.png", "results.json"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name
    results = compare.redraw(tmp_path, ["psnr=1e4"])
    assert "nothing measured is good enough" in results["answers"][0]["text"]
    with pytest.raises(KitError, match="unknown quality 'pnsr'; did you mean 'psnr'"):
        compare.redraw(tmp_path, ["pnsr=1"])
    with pytest.raises(KitError, match="there is no"):
        compare.redraw(tmp_path / "none")


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    model = pipeline()
    network = model.stages[0].denoiser

    def go(names=("ddim", "heun")):
        return run(subject(model, n=2), names, [2, 4], tmp_path)

    network.fail_at = 20 + 2 + 4 + 2  # in the third cell, after the reference and ddim at 2 and 4 steps
    with pytest.raises(KeyboardInterrupt):
        go()
    stopped = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["sampler"], cell["steps"]) for cell in stopped["cells"]] == [("ddim", 2), ("ddim", 4)]
    assert not (tmp_path / "report.html").exists()

    network.fail_at, network.calls = math.inf, 0
    results = go()
    assert network.calls == 1 + 3 + 7  # a warming-up step, and heun at 2 and 4 steps; nothing is done again
    assert results["cells"][:2] == stopped["cells"]
    network.calls = 0
    assert len(go()["cells"]) == 4
    assert network.calls == 0
    assert len(go(("ddim", "heun", "dpmpp_2m"))["cells"]) == 6  # a sampler added later


def test_resumed_numbers_are_those_of_one_go(tmp_path):
    for counts in ([2], [2, 4]):
        run(subject(n=2), ["ddim"], counts, tmp_path / "a")
    run(subject(n=2), ["ddim"], [4], tmp_path / "b")
    (tmp_path / "a" / "converged" / "guidance-own-seed-0.safetensors").write_bytes(b"damaged")
    run(subject(n=2), ["ddim"], [2, 4, 8], tmp_path / "a")  # drawn again, and kept once
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert cells(a)["ddim", 4]["rmse_final"] == cells(b)["ddim", 4]["rmse_final"]
    assert len(a["references"]) == 1


def test_guidance_and_seeds_have_converged_results_of_their_own(tmp_path):
    model = pipeline((guidance.create("cfg", scale=2.0),))
    results = run(
        subject(model, n=3), ["ddim", "heun"], [2, 4], tmp_path, guidance=[None, 1.0], seeds=[0, 3], shown=2
    )
    assert len(results["cells"]) == 2 * 2 * 2 * 2
    assert {(r["guidance"], r["seed"]) for r in results["references"]} == {
        (scale, seed) for scale in (None, 1.0) for seed in (0, 3)
    }
    passes = {cell["guidance"]: cell["evaluations_per_picture"] for cell in results["cells"]}
    assert passes == {
        None: 14.0,
        1.0: 7.0,
    }  # heun at 4 steps comes last: 7 calls, of one or two pictures each
    # The words say nothing, so guidance changes nothing: equal noise, equal distance.
    by_scale = [
        [cell["rmse"] for cell in results["cells"] if cell["guidance"] == scale] for scale in (None, 1.0)
    ]
    assert by_scale[0] == pytest.approx(by_scale[1], rel=1e-4)  # cfg sums in float32
    points = summary.points(results)
    assert {point["seeds"] for point in points} == {2}
    for point in points:
        low, high = point["spread"]["rmse"]
        assert low < point["rmse"] < high  # two seeds are two noises


def test_seeds_do_not_share_noise(tmp_path):
    what = subject(n=3)
    first, second = (
        what.draw(samplers.create("ddim"), 2, None, seed, lambda: None).first.flatten(1) for seed in (0, 1)
    )
    assert torch.cdist(first, second).min() > 0.1  # no picture of one seed is among those of the next
    assert what.texts(0) != what.texts(1)


def test_budget_of_evaluations(tmp_path):
    results = run(subject(n=1), ["ddim", "heun", "dpm_solver_3s"], [2, 8], tmp_path, budget="nfe")
    found = {
        (cell["sampler"], cell["budget"]["nfe"]): (cell["steps"], cell["nfe"]) for cell in results["cells"]
    }
    assert found["ddim", 8] == (8, 8)
    assert found["heun", 8] == (4, 7)
    assert all(nfe <= budget for (_, budget), (_, nfe) in found.items())


def test_a_budget_too_small_for_a_sampler_is_left_out_and_said(tmp_path):
    class Dear:
        name, spacing = "dear", "auto"

        def tableau(self, schedule, steps):
            return samplers.create("ddim").tableau(schedule, 4 * steps)

        sample = samplers.base.Sampler.sample

    entries = [*make_entries(["ddim"]), compare.Entry("dear", Dear())]
    cells_, skipped = compare.plan(subject(), entries, [3, 8], "nfe", [None], [0])
    assert [(cell.entry.label, cell.steps) for cell in cells_] == [("ddim", 3), ("ddim", 8), ("dear", 2)]
    assert [(s["sampler"], s["nfe"]) for s in skipped] == [("dear", 3)]
    assert "takes 4 evaluations for one step" in skipped[0]["why"]
    with pytest.raises(KitError, match="takes 4 evaluations"):
        compare.plan(subject(), entries, [3], "nfe", [None], [0])


def test_values_that_are_not_finite_are_told_and_the_rest_goes_on(tmp_path):
    model = pipeline()
    model.stages[0].denoiser.spoil_from = 20 + 2 + 1  # in the second cell, and so ever after
    results = run(subject(model, n=1), ["ddim"], [2, 3], tmp_path)
    assert "rmse" in results["cells"][0]
    assert "not finite" in results["cells"][1]["failed"]
    assert [point["steps"] for point in summary.points(results)] == [2]
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_distribution_distances_are_those_to_rendered_scenes(tmp_path):
    what = subject(n=6)
    results = run(what, ["ddim"], [2], tmp_path, measures=Measures(what, parse("pixels").load(), real=20))
    (cell,) = results["cells"]
    (reference,) = results["references"]
    keys = [quality["key"] for quality in results["qualities"]]
    assert keys[:5] == ["rmse", "rmse_final", "psnr", "ssim", "accuracy"]
    assert keys[5:] == ["fid", "kid", "precision", "recall"]
    assert all(cell[key] is not None and reference[key] is not None for key in keys[5:])
    assert cell["fid"] > 1  # grey noise against scenes: 192 pixels' means alone differ by more
    assert cell["recall"] == 0
    assert results["settings"]["features"] == "pixels"


def test_analytic_problem(tmp_path):
    what = AnalyticSubject("gmm2d", "edm", n=200)
    results = run(
        what, ["heun", "dpm_adaptive", "ddim:eta=1"], [6, 24], tmp_path, reference=None, seeds=[0, 1]
    )
    points = {(p["sampler"], p["steps"]): p for p in summary.points(results)}
    assert points["heun", 24]["rmse"] < points["heun", 6]["rmse"] / 4  # second order: 4² less, with slack
    assert points["heun", 24]["nfe"] == 47
    assert points["dpm_adaptive", 6]["nfe"] > 6  # as many as it needs, counted
    assert results["samplers"]["ddim:eta=1"]["options"]["eta"] == 1
    assert {label: facts["stochastic"] for label, facts in results["samplers"].items()} == {
        "heun": False,
        "dpm_adaptive": False,
        "ddim:eta=1": True,  # by its option
    }
    for point in points.values():
        assert point["energy"] > 0
    (first, *_) = results["references"]
    # A sampler that has converged is as near to the data as the exact solution: 200 samples are this far.
    assert points["heun", 24]["sliced_wasserstein"] == pytest.approx(first["sliced_wasserstein"], rel=0.5)
    assert results["settings"] == {
        "subject": "analytic:gmm2d",
        "n": 200,
        "schedule": "edm",
        "reference": "exact",
        "device": results["provenance"]["device"],
        "features": None,
        "data": None,
        "real": 512,
        "lpips": None,
    }


def test_exact_solution_of_a_gaussian_is_what_samplers_converge_to():
    what = AnalyticSubject("gaussian", "scaled_linear", n=50)
    exact = what.exact(0)
    drawn = what.draw(samplers.create("dpmpp_3m", spacing="log_snr"), 400, None, 0, lambda: None)
    # third order at 400 steps; the discrete schedule's last step, from sigma = 0.03, is taken as one
    assert (drawn.final - exact.final).abs().max() < 1e-3


def test_swapped_samplers_keep_the_grid():
    (heun, other) = make_entries(["heun", "ddim:spacing=karras"], subject().keep())
    assert heun.sampler.spacing == "log_snr"
    assert other.sampler.spacing == "karras"


def test_other_models_and_settings_are_not_mixed(tmp_path):
    def go(model, names=("ddim",), **other):
        run(subject(model, n=1, **other), names, [1], tmp_path, reference="dpmpp_3m@4")

    model = pipeline()
    go(model)
    with pytest.raises(KitError, match="made with language = 'en', not 'zh'"):
        go(model, language="zh")
    nn.init.constant_(model.stages[0].denoiser.mean, 0.3)
    with pytest.raises(KitError, match="made with model"):
        go(model)
    assert fingerprint(pipeline()) == fingerprint(pipeline()) != fingerprint(model)
    model = pipeline()
    model.stages[0].schedule.t_max *= 0.99
    assert fingerprint(model) != fingerprint(pipeline())
    entries = make_entries(["ddim"], {"spacing": "karras"})
    with pytest.raises(KitError, match="sampler 'ddim' was made with spacing = 'log_snr', not 'karras'"):
        compare.run(subject(n=1), entries, [1], tmp_path, reference="dpmpp_3m@4")
    for text in ("{", "[]", '{"format": 1, "cells": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(KitError, match="choose another folder"):
            go(pipeline())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"samplers": []}, "at least one sampler"),
        ({"counts": []}, "one budget"),
        ({"counts": [0]}, "at least 1"),
        ({"counts": [True]}, "at least 1"),
        ({"budget": "calls"}, "unknown budget"),
        ({"guidance": [math.nan]}, "finite"),
        ({"guidance": []}, "guidance scale"),
        ({"seeds": [-1]}, "whole numbers from 0"),
        ({"seeds": [0.5]}, "whole numbers from 0"),
        ({"reference": "dpmpp_3m"}, "SAMPLER@STEPS"),
        ({"reference": "exact"}, "'exact' is for analytic"),
        ({"reference": "dppm_3m@4"}, "did you mean"),
        ({"reference": "euler_ancestral@4"}, "is stochastic"),
        ({"targets": ["rmse=few"]}, "must be a number"),
        ({"targets": ["fid=3"]}, "unknown quality 'fid'"),
    ],
)
def test_bad_arguments_cost_nothing(tmp_path, arguments, says):
    model = pipeline()
    settings = {"samplers": make_entries(["ddim"]), "counts": [2], "out": tmp_path, **arguments}
    with pytest.raises(KitError, match=says):
        compare.run(subject(model), **settings)
    assert model.stages[0].denoiser.calls == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 0}, "at least 1"),
        ({"split": "heldout"}, "did you mean 'held_out'"),
        ({"prompts": ["a", " "]}, "must not be empty"),
        ({"data": "fodler:path=x"}, "did you mean 'folder'"),
        ({"data": "folder:path=/none"}, "does not exist"),
    ],
)
def test_bad_subjects(settings, says):
    with pytest.raises(KitError, match=says):
        subject(**settings)


def test_bad_analytic_subjects():
    for settings, says in [
        ({"name": "gmm3d"}, "did you mean 'gmm2d'"),
        ({"name": "gmm2d", "schedule": "edn"}, "did you mean 'edm'"),
        ({"name": "gmm2d", "schedule": "flow:shift=x"}, "must be a number"),
        ({"name": "gmm2d", "n": 0}, "at least 1"),
    ]:
        with pytest.raises(KitError, match=says):
            AnalyticSubject(**settings)
    with pytest.raises(KitError, match="no guidance to scale"):
        compare.plan(AnalyticSubject("gmm2d"), make_entries(["ddim"]), [2], "steps", [2.0], [0])
    with pytest.raises(KitError, match="has no pictures"):
        Measures(AnalyticSubject("gmm2d"), parse("pixels").load())
    with pytest.raises(KitError, match="at least 4 pictures"):
        Measures(subject(n=3), parse("pixels").load())


def test_data_and_guidance_that_do_not_fit_are_told_before_anything_is_drawn(tmp_path):
    (tmp_path / "few").mkdir()
    for i in range(3):
        torch.manual_seed(i)
        save_png(tmp_path / "few" / f"{i}.png")
        (tmp_path / "few" / f"{i}.txt").write_text("a picture")
    model = pipeline((guidance.create("cfg_pp", scale=0.5),))
    what = subject(model, n=4, data=f"folder:path={tmp_path / 'few'}")
    few = Measures(what, parse("pixels").load())
    out = tmp_path / "out"
    for settings, says in [
        ({"measures": few}, "--data holds 3 pictures"),
        ({"guidance": [0.5, 3.0]}, "from 0 to 1"),
    ]:
        with pytest.raises(KitError, match=says):
            run(what, ["ddim"], [2], out, **settings)
    with pytest.raises(KitError, match="'heun' has not"):
        compare.run(what, make_entries(["ddim", "heun"]), [2], out, reference="ddim@4")
    assert model.stages[0].denoiser.calls == 0
    assert not out.exists()


def save_png(path):
    from imagen_kit.images import Images

    Images(torch.rand(1, 3, 40, 32), ["a"], [0]).save(path)

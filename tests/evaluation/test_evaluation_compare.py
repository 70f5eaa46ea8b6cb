"""Comparison of samplers on a model whose exact picture is known: Gaussian data, whose ODE is solved."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from imagen_kit import guidance, samplers, schedules
from imagen_kit.conditioning import TextEmbeddings
from imagen_kit.errors import KitError
from imagen_kit.evaluation import compare
from imagen_kit.evaluation.drawing import draw, fingerprint, make_sampler
from imagen_kit.pipeline import Pipeline, Stage

MEAN, STD = 0.2, 0.15


class Words(nn.Module):
    """Text embeddings that say nothing."""

    def forward(self, prompts):
        n = len(prompts)
        return TextEmbeddings(torch.zeros(n, 1, 4), torch.ones(n, 1, dtype=torch.bool))


class Gaussian(nn.Module):
    """The exact x0-prediction for pixels that are N(MEAN, STD²), with a weight so that there is one."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.mean, self.calls = schedule, nn.Parameter(torch.tensor(MEAN)), 0
        self.fail_at = math.inf

    def forward(self, x, t, cond):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        alpha, sigma = (v.to(x).reshape(-1, 1, 1, 1) for v in self.schedule.alpha_sigma(t.double()))
        return self.mean + alpha * STD**2 * (x - alpha * self.mean) / (alpha**2 * STD**2 + sigma**2)


class Enlarge(nn.Module):
    """A second stage that returns the first one's picture."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, cond):
        return cond.low_res * self.scale


def pipeline(strategies=()):
    schedule = schedules.create("cosine")
    sampler = samplers.create("ddim", spacing="log_snr")
    first = Stage("base", Gaussian(schedule), schedule, "x0", sampler, 16, steps=4, guidance=strategies)
    second = Stage("sr", Enlarge(), schedule, "x0", samplers.create("ddim"), 32, steps=2)
    return Pipeline(Words(), [first, second])


def cells(results):
    return {(cell["sampler"], cell["steps"]): cell for cell in results["cells"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    names = ["ddim", "dpmpp_2m", "heun", "euler_ancestral"]
    results = compare.run(pipeline(), names, [4, 8, 16], out, n=5, batch_size=3, reference=("dpmpp_3m", 100))
    return out, results


def test_evaluations_are_counted_at_the_network(finished):
    found = cells(finished[1])
    assert len(found) == 12
    for steps in (4, 8, 16):
        assert found["ddim", steps]["nfe"] == found["dpmpp_2m", steps]["nfe"] == steps
        assert found["heun", steps]["nfe"] == 2 * steps - 1  # the last step, to sigma 0, has no corrector
        assert found["ddim", steps]["nfe_all_stages"] == steps + 2
        assert found["ddim", steps]["evaluations_per_picture"] == steps  # no guidance
    assert finished[1]["reference"]["nfe"] == 100


def test_guidance_doubles_the_rows_and_not_the_calls():
    model = pipeline((guidance.create("cfg", scale=2.0),))
    drawn = draw(model, ["a", "b", "c"], [0, 1, 2], samplers.create("ddim"), 4, batch_size=2)
    assert drawn.calls == {"base": 4, "sr": 2}
    assert drawn.rows == {"base": 8.0, "sr": 2.0}


def test_distance_falls_as_the_order_says(finished):
    found = cells(finished[1])
    for name, order in (("ddim", 1), ("dpmpp_2m", 2)):
        errors = [found[name, steps]["rmse_first"] for steps in (4, 8, 16)]
        assert errors[0] > errors[1] > errors[2] > 0
        # halving the step divides the error by 2^order; half an order of slack, as these are few steps
        assert math.log2(errors[1] / errors[2]) > order - 0.5
    assert found["dpmpp_2m", 16]["rmse_first"] < found["ddim", 16]["rmse_first"]
    assert found["euler_ancestral", 16]["stochastic"]
    assert not found["heun", 16]["stochastic"]
    # fresh noise leads to another picture of the same spread: far from the converged one
    assert found["euler_ancestral", 16]["rmse_first"] > 0.02
    for cell in found.values():
        assert 0 < cell["rmse_final"] <= cell["rmse_first"] * 1.01  # enlarging averages neighbours


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
    kept = load_file(finished[0] / "reference.safetensors")
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
    assert sorted(file.name for file in out.iterdir()) == [
        "reference.safetensors",
        "results.json",
        "tradeoff.png",
    ]


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    def go(model, steps, names=("ddim", "heun")):
        return compare.run(model, names, steps, tmp_path, n=2, reference=("dpmpp_3m", 20))

    model = pipeline()
    network = model.stages[0].denoiser
    network.fail_at = 20 + 2 + 4 + 2  # in the third cell, after the reference and ddim at 2 and 4 steps
    with pytest.raises(KeyboardInterrupt):
        go(model, [2, 4])
    stopped = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["sampler"], cell["steps"]) for cell in stopped["cells"]] == [("ddim", 2), ("ddim", 4)]

    network.fail_at, network.calls = math.inf, 0
    results = go(model, [2, 4])
    assert network.calls == 1 + 3 + 7  # a warming-up step, and heun at 2 and 4 steps; nothing is done again
    assert results["cells"][:2] == stopped["cells"]
    network.calls = 0
    assert len(go(model, [2, 4])["cells"]) == 4
    assert network.calls == 0
    assert len(go(model, [2, 4], ("ddim", "heun", "dpmpp_2m"))["cells"]) == 6  # a sampler added later


def test_resumed_numbers_are_those_of_one_go(tmp_path):
    compare.run(pipeline(), ["ddim"], [2], tmp_path / "a", n=2, reference=("dpmpp_3m", 20))
    compare.run(pipeline(), ["ddim"], [2, 4], tmp_path / "a", n=2, reference=("dpmpp_3m", 20))
    compare.run(pipeline(), ["ddim"], [4], tmp_path / "b", n=2, reference=("dpmpp_3m", 20))
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert cells(a)["ddim", 4]["rmse_final"] == cells(b)["ddim", 4]["rmse_final"]


def test_budget_of_evaluations(tmp_path):
    model = pipeline()
    results = compare.run(
        model, ["ddim", "heun"], [8], tmp_path, n=1, budget="nfe", reference=("dpmpp_3m", 10)
    )
    found = {cell["sampler"]: (cell["steps"], cell["nfe"]) for cell in results["cells"]}
    assert found == {"ddim": (8, 8), "heun": (4, 7)}


def test_swapped_samplers_keep_the_grid():
    stage = pipeline().stages[0]
    assert make_sampler(stage, "heun").spacing == "log_snr"
    with pytest.raises(KitError, match="did you mean 'dpmpp_2m'"):
        make_sampler(stage, "dpmp_2m")


def test_other_models_and_settings_are_not_mixed(tmp_path):
    def go(model, **other):
        compare.run(model, ["ddim"], [1], tmp_path, **{"n": 1, "reference": ("dpmpp_3m", 4), **other})

    model = pipeline()
    go(model)
    with pytest.raises(KitError, match="made with seed = 0, not 1"):
        go(model, seed=1)
    nn.init.constant_(model.stages[0].denoiser.mean, 0.3)
    with pytest.raises(KitError, match="made with model"):
        go(model)
    assert fingerprint(pipeline()) == fingerprint(pipeline()) != fingerprint(model)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(KitError, match="not a comparison's results"):
        go(model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"samplers": ["dimm"]}, "did you mean 'ddim'"),
        ({"samplers": []}, "at least one sampler"),
        ({"steps": []}, "at least one sampler"),
        ({"steps": [0]}, "at least 1"),
        ({"budget": "calls"}, "unknown budget"),
        ({"n": 0}, "at least 1"),
    ],
)
def test_bad_arguments_cost_nothing(tmp_path, arguments, says):
    model = pipeline()
    with pytest.raises(KitError, match=says):
        compare.run(model, **{"samplers": ["ddim"], "steps": [2], "out": tmp_path, **arguments})
    assert model.stages[0].denoiser.calls == 0
    assert list(tmp_path.iterdir()) == []

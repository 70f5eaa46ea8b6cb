"""Kinds of benchmark: all of them run, are seeded, refuse what there is not, and do without what is not installed."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_cases import KL, NETWORKS

from imagen_kit.bench import floor, small
from imagen_kit.bench.peers import imagen_pytorch
from imagen_kit.bench.subject import OURS, Case, Subject, Unavailable
from imagen_kit.bench.subjects import build, check, names
from imagen_kit.bench.subjects.startup import Process
from imagen_kit.bench.systems import Asked
from imagen_kit.bench.work import Way, chosen_peers
from imagen_kit.errors import KitError
from imagen_kit.hollow import hollow

CPU = torch.device("cpu")
DIT = {"network": NETWORKS["DiTTransformer2DModel official"][1], "resolution": 8}
CASES = {
    "denoiser": Case("denoiser", "dit", {**DIT, "batch": 2, "peers": "none"}),
    "training": Case("training", "dit", {**DIT, "peers": "none"}),
    "text_encoder": Case("text_encoder", "t5", {"length": 4, "peers": "none"}),
    "sampler": Case("sampler", "ddim", {"steps": 3, "resolution": 8, "peers": "none"}),
    "codec": Case("codec", "kl", {"options": KL, "resolution": 16, "peers": "none"}),
    "recipe": Case("recipe", "sd15", {"size": "tiny", "steps": 2, "peers": "none"}),
    "memory": Case("memory", "sd15", {"size": "tiny", "steps": 2, "peers": "none"}),
    "gain": Case("gain", "sd15", {"size": "tiny", "steps": 2, "option": {"dtype": "bf16"}}),
    "startup": Case("startup", "import", {"peers": "none"}),
}


def test_every_kind_has_a_case_here():
    assert set(CASES) == set(names())


@pytest.mark.parametrize("kind", sorted(set(CASES) - {"startup"}))
def test_every_kind_runs(kind):
    """Twice built, twice the same result; what is counted is told."""
    case = CASES[kind]
    assert check(case) == []
    first, second = (build(case, CPU)[OURS] for _ in range(2))
    out = first()
    assert out.isfinite().all()
    assert out.abs().sum() > 0
    assert torch.equal(out, second())
    assert first.unit in ("evaluations", "pictures", "prompts", "steps")
    assert first.units >= 1
    assert first.note
    assert first.flops() > 0 or kind == "sampler"
    first.close()
    assert first() is None
    assert list(first.modules) == []


@pytest.mark.parametrize("kind", sorted(CASES))
def test_an_option_that_there_is_not(kind):
    case = CASES[kind]
    wrong = {"startup": ("recip", "recipe")}.get(kind, ("batches" if kind != "sampler" else "step", "batch"))
    (line,) = check(Case(kind, case.name, {**case.options, wrong[0]: 2}))
    assert line.startswith(f"a {kind} case has no option {wrong[0]!r}; did you mean ")
    assert "\n" not in line
    with pytest.raises(KitError, match=wrong[0]):
        build(Case(kind, case.name, {**case.options, wrong[0]: 2}), CPU)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("denoiser", {"mode": "compiled"}, "did you mean 'compile'"),
        ("denoiser", {"dtype": "bf61"}, "did you mean 'bf16'"),
        ("denoiser", {"attention": "flsh"}, "did you mean 'flash'"),
        ("denoiser", {"peers": "difusers"}, "did you mean 'diffusers'"),
        ("denoiser", {"network": {"widht": 3}}, "did you mean 'width'"),
        ("training", {"mode": "graph"}, "unknown mode of a training step 'graph'"),
        ("training", {"dtype": "fp16"}, "unknown dtype of a training step 'fp16'"),
        ("sampler", {"mode": "compile"}, "unknown mode of a sampler 'compile'"),
        ("codec", {"work": "decoding"}, "did you mean 'decode'"),
        ("text_encoder", {"size": "smal"}, "did you mean 'small'"),
        ("recipe", {"size": "smal"}, "did you mean 'small'"),
        ("recipe", {"weights": "reel"}, "did you mean 'real'"),
        ("recipe", {"stages": 2}, "has 1 stages; stages cannot be 2"),
        ("recipe", {"set": ["stages.0.sampler.step=2"]}, "sampler 'plms' has no option 'step'"),
        ("recipe", {"performance": {"compil": "whole"}}, "did you mean 'compile'"),
        ("recipe", {"set": ["offload=model"]}, "give weights: real"),
    ],
)
def test_a_value_that_there_is_not(kind, options, message):
    case = CASES[kind]
    with pytest.raises(KitError, match=message) as error:
        build(Case(kind, case.name, {**case.options, **options}), CPU)
    assert "\n" not in str(error.value)


def test_a_recipe_without_a_small_variant():
    with pytest.raises(KitError, match="'adm-256' has no small variant; there is one of dit-xl-2-256"):
        build(Case("recipe", "adm-256", {"size": "small"}), CPU)


def test_execution_of_an_encoder_that_has_none():
    with pytest.raises(KitError, match="'clip' has no execution 'int8'"):
        build(Case("text_encoder", "clip", {"execution": "int8"}), CPU)


def test_peers_by_name():
    known = ("diffusers", "diffusers compiled", "k_diffusion")
    assert chosen_peers("all", known) == list(known)
    assert chosen_peers("none", known) == []
    assert chosen_peers("k_diffusion, diffusers", known) == ["diffusers", "k_diffusion"]


@pytest.mark.parametrize("mode", ["graph", "compile_graph"])
def test_a_graph_needs_cuda(mode):
    found = build(Case("denoiser", "dit", {**DIT, "mode": mode, "peers": "none"}), CPU)[OURS]
    assert isinstance(found, Unavailable)
    assert found.reason == f"mode {mode} replays a CUDA graph, and this is a cpu device"
    assert Way(mode=mode).graph
    sampler = build(Case("sampler", "ddim", {"mode": "graph", "peers": "none"}), CPU)[OURS]
    assert isinstance(sampler, Unavailable)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["graph", "compile_graph"])
def test_a_replayed_network_answers_as_the_network(mode):
    subject = build(Case("denoiser", "dit", {**DIT, "mode": mode, "peers": "none"}), torch.device("cuda"))[
        OURS
    ]
    assert isinstance(subject, Subject)
    want = subject.eager()
    for _ in range(2):
        # the same kernels but for those that a compiler fuses
        torch.testing.assert_close(subject(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "package", "who"),
    [
        ("denoiser", "diffusers", "diffusers"),
        ("codec", "diffusers", "diffusers"),
        ("recipe", "diffusers", "diffusers"),
        ("sampler", "k_diffusion", "k_diffusion"),
    ],
)
def test_a_package_that_is_not_installed(monkeypatch, kind, package, who):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    case = CASES[kind]
    name = "euler" if kind == "sampler" else case.name
    found = build(Case(kind, name, {**case.options, "peers": who}), CPU)
    assert isinstance(found[OURS], Subject)
    assert isinstance(found[who], Unavailable)
    assert package in found[who].reason
    assert "\n" not in found[who].reason


def test_imagen_pytorch_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(imagen_pytorch, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "imagen_pytorch", raising=False)
    with pytest.raises(KitError, match="imagen_pytorch is not installed"):
        imagen_pytorch.library()


def test_importing_imagen_pytorch_leaves_nothing_behind():
    import transformers

    inherited = transformers.T5Config.from_pretrained
    try:
        imagen_pytorch.library()
    except KitError:
        pytest.skip("imagen_pytorch does not import here")
    assert "imagen_pytorch" not in sys.modules
    assert transformers.T5Config.from_pretrained == inherited


def test_start_up():
    """Seconds of the process itself, a little less than those of the call."""
    import time

    subject = build(CASES["startup"], CPU)[OURS]
    began = time.monotonic()
    assert subject() is None
    assert 0 < subject.seconds < time.monotonic() - began
    assert not subject.countable


def test_start_up_that_fails_says_why():
    with pytest.raises(KitError, match=r"^it ended with code 3: no such thing$"):
        Process("print('no such thing', file=sys.stderr)\nsys.exit(3)", [], "it")()


def test_the_first_call_of_a_network():
    subject = build(Case("startup", "first_call", {"recipe": "tiny"}), CPU)[OURS]
    subject()
    assert 0 < subject.seconds < 120


# ---- memory ------------------------------------------------------------------------------------------------------


def test_floor_of_a_chain():
    """y = relu(Wx + b), z = V y: by hand."""
    one = torch.nn.Sequential(
        torch.nn.Linear(100, 1000, bias=False), torch.nn.ReLU(), torch.nn.Linear(1000, 10, bias=False)
    )
    x = torch.randn(1, 100)
    with torch.no_grad():
        found = floor.measure(lambda: one(x), CPU, one.parameters())
    assert found.largest == 4 * (1000 + 1000)  # relu reads 1000 numbers and writes 1000
    assert found.alive == 4 * (1000 + 1000)
    assert found.operation in ("relu", "clamp_min")


def test_floor_counts_what_is_kept_for_later():
    """A skip connection stays while others come and go; a view and work in place take nothing."""
    x = torch.randn(1000)

    def work():
        kept = x * 2
        y = kept + 1
        for _ in range(3):
            y = y + 1
        y.view(10, 100).add_(1)
        return y + kept

    found = floor.measure(work, CPU, [])
    assert found.largest == 4 * 3000  # the last sum: two read, one written
    assert found.alive == 4 * 3000  # kept, and the y before and after; x is read once, at the start


def test_floor_leaves_weights_out():
    weight = torch.randn(1000)
    x = torch.randn(1000)
    assert floor.measure(lambda: weight * x, CPU, [weight]).largest == 4 * 2000
    assert floor.measure(lambda: weight * x, CPU, []).largest == 4 * 3000


def test_floor_sees_an_address_that_is_used_again():
    x = torch.randn(1000)

    def work():
        y = x
        for _ in range(20):  # the allocator hands out the same memory again and again
            y = y * 2
        return y

    assert floor.measure(work, CPU, []).alive == 4 * 2000


def test_a_memory_row_tells_the_floor():
    options = {"size": "tiny", "steps": 1, "peers": "none"}
    few, many = (build(Case("memory", "deepfloyd-if", {**options, "batch": b}), CPU)[OURS] for b in (1, 4))
    assert "largest activation" in few.note
    assert few.floor.largest <= few.floor.alive
    assert many.floor.alive == pytest.approx(4 * few.floor.alive, rel=0.02)


def test_more_pictures_are_decoded_in_the_memory_of_one():
    options = {
        "options": {"widths": [32, 64], "blocks": 1},
        "resolution": 128,
        "work": "decode",
        "peers": "none",
    }
    few, many = (build(Case("codec", "kl", {**options, "batch": b}), CPU)[OURS] for b in (1, 4))
    alive = [floor.measure(s.eager, CPU, s.modules[0].parameters()).alive for s in (few, many)]
    pictures = 4 * 3 * 128 * 128 * 4  # bytes of four
    assert alive[0] < alive[1] <= alive[0] + 2 * pictures  # each, and all of them together


@pytest.mark.parametrize("name", small.CHANGES)
def test_small_variants_are_small(name):
    """Recipes that hold together, of a few million parameters."""
    recipe = Asked(name, "small", weights="real").load(CPU)
    with hollow():
        network = recipe.build_stage_denoiser(0, recipe.hollow_text_encoder(), weights=False)
    assert 2e6 < sum(p.numel() for p in network.parameters()) < 3e7
    assert len(recipe.stages) == 1


@pytest.mark.filterwarnings("ignore:stage .* runs without a graph")
def test_a_loop_that_was_not_recorded_is_not_read_as_one_that_was():
    options = {"size": "tiny", "steps": 1, "peers": "none", "performance": {"graph": True}}
    subject = build(Case("recipe", "dit-xl-2-256", options), CPU)[OURS]
    assert "without" not in subject.note
    subject()
    subject()
    assert subject.note.count("without a graph: ") == 1
    assert subject.note.endswith("CUDA graphs are for CUDA devices, not cpu")

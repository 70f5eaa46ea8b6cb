"""Offloaded pipelines: the same pictures bit for bit, and memory only for the part whose turn it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from imagen_kit import denoisers, recipe
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, RecipeError
from imagen_kit.performance.offload import Carried, Offload, Remade
from imagen_kit.weights import save_safetensors

PROMPTS = ["a large red star on a white background", "圆环"]
CPU = torch.device("cpu")


def hollow(module):
    return all(t.is_meta for t in (*module.parameters(), *module.buffers()))


@pytest.fixture(scope="module")
def plain():
    return recipe.load("tiny").build()(PROMPTS, seed=3).tensor


@pytest.mark.parametrize("mode", ["model", "layers"])
def test_pictures_are_those_of_parts_that_stay(mode, plain):
    pipeline = recipe.load("tiny", [f"offload={mode}"]).build()
    for _ in range(2):
        assert hollow(pipeline.text_encoder.network)
        assert all(hollow(module) for stage in pipeline.stages for module in stage.modules)
        assert torch.equal(pipeline(PROMPTS, seed=3).tensor, plain)
    apart = recipe.load("tiny").build()(PROMPTS, seed=3, batch_size=1).tensor
    assert torch.equal(pipeline(PROMPTS, seed=3, batch_size=1).tensor, apart)
    assert pipeline.device == CPU


def test_further_networks_and_several_encoders_take_turns_too():
    weak = "{weak: {denoiser: {name: unet, levels: [{channels: 16, blocks: 1}], head_dim: 16}}}"
    two = "[{name: t5, size: tiny}, {name: clip, size: tiny, use: pooled}]"
    changes = [
        f"stages.base.networks={weak}",
        "stages.base.guidance=[{name: autoguidance}]",
        f"text_encoder={{name: concat, along: tokens, encoders: {two}}}",
    ]
    expected = recipe.load("tiny", changes).build()(PROMPTS).tensor
    pipeline = recipe.load("tiny", [*changes, "offload=model"]).build()
    assert torch.equal(pipeline(PROMPTS).tensor, expected)
    assert all(hollow(part.network) for part in pipeline.text_encoder.parts)
    assert len(pipeline.stages[0].modules) == 2


def test_one_part_has_memory_at_a_time_and_remembered_prompts_need_no_encoder():
    pipeline = recipe.load("tiny", ["offload=model"]).build()
    parts = {"text": pipeline.text_encoder.network}
    parts |= {stage.name: stage.denoiser for stage in pipeline.stages}
    seen = []
    for module in parts.values():
        module.register_forward_pre_hook(
            lambda *_: seen.append([name for name, part in parts.items() if not hollow(part)])
        )
    pipeline(PROMPTS)
    distinct = [held for i, held in enumerate(seen) if i == 0 or held != seen[i - 1]]
    assert distinct == [["text"], *([stage.name] for stage in pipeline.stages)]
    seen.clear()
    pipeline(PROMPTS, seed=1)
    assert ["text"] not in seen


def test_an_error_in_a_turn_leaves_the_parts_empty_and_usable(plain):
    pipeline = recipe.load("tiny", ["offload=model"]).build()

    def stop(stage, step, x, x0):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        pipeline(PROMPTS, callback=stop)
    assert all(hollow(stage.denoiser) for stage in pipeline.stages)
    assert torch.equal(pipeline(PROMPTS, seed=3).tensor, plain)


def test_an_offloaded_pipeline_is_not_moved():
    with pytest.raises(KitError, match="offloaded pipeline moves its own parts"):
        recipe.load("tiny", ["offload=model"]).build().to("cpu")
    with pytest.raises(KitError, match=r"unknown offload 'modell'; did you mean 'model'\?"):
        Offload("modell", "cpu")


def test_turns_nest_and_modules_without_a_shelf_are_left_alone():
    made = []

    def make():
        torch.manual_seed(0)
        made.append(nn.Linear(3, 3))
        return made[-1]

    module, other = make(), nn.Linear(2, 2)
    expected = module.weight.detach().clone()
    keeper = Offload("model", "cpu")
    keeper.adopt(module, make)
    keeper.adopt(other)  # on the CPU there is no other place for it
    keeper.adopt("no module")
    assert hollow(module)
    assert not hollow(other)
    with keeper.turn(module, other):
        with keeper.turn(module):
            assert torch.equal(module.weight, expected)
        assert not hollow(module)
    assert hollow(module)
    assert len(made) == 2


def test_shared_parameters_stay_shared_and_keep_their_flags():
    def make():
        torch.manual_seed(1)
        pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        pair[1].weight = pair[0].weight
        pair[0].bias.requires_grad_(False)
        return pair

    module = make().eval()
    x = torch.randn(3, 4)
    expected = module(x)
    for shelf in (Remade(module, make), Carried(module, CPU)):
        for _ in range(2):
            shelf.take()
            assert module[0].weight is module[1].weight
            assert not module[0].bias.requires_grad
            assert module[1].bias.requires_grad
            assert torch.equal(module(x), expected)
            shelf.put()
        shelf.take()


@pytest.mark.parametrize("by_blocks", [False, True])
@torch.no_grad()
def test_carried_weights_come_and_go_without_a_change(by_blocks):
    """What a GPU does, done between two places in main memory."""
    torch.manual_seed(0)
    network = denoisers.create("dit", width=32, depth=3, heads=2, num_classes=3).eval()
    for p in network.parameters():
        p.normal_(0, 0.1)
    x, t, cond = torch.randn(2, 3, 8, 8), torch.rand(2), Cond(labels=torch.tensor([0, 2]))
    expected = network(x, t, cond)
    shelf = Carried(network, CPU, by_blocks)
    for _ in range(2):
        shelf.take()
        assert torch.equal(network(x, t, cond), expected)
        assert torch.equal(network(x, t, cond), expected)
        assert hollow(network.blocks) == by_blocks
        assert not hollow(network.final_layer)
        shelf.put()


def test_what_needs_weights_to_stay_is_told_before_anything_is_built(monkeypatch):
    from imagen_kit.recipe import offloading

    monkeypatch.setattr(offloading, "Offload", lambda mode, device: _Elsewhere(mode))
    changes = ["stages.base.performance={graph: true, compile: blocks}"]
    with pytest.raises(
        RecipeError, match=r"performance\.graph.* must be none(.|\n)*performance\.compile.* must be off"
    ):
        recipe.load("tiny", [*changes, "offload=layers"]).build()


class _Elsewhere:
    device = torch.device("cuda")

    def __init__(self, mode):
        self.mode = mode


# The high-water mark of a process of its own, above what it held before the pipeline was built.
PROBE = """
import sys, torch
from imagen_kit import recipe
torch.set_num_threads(1)
held = lambda key: int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024
recipe.load("tiny").build()("a ring")
large = recipe.load(sys.argv[1], [f"offload={sys.argv[2]}"])  # checking it brings torch's compiler, 200 MB
before = held("VmRSS")
pipeline = large.build()
pipeline("a ring")
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_memory_is_that_of_the_largest_part(tmp_path):
    """Two stages of 100 MB each and an encoder of half that: what waits is in its file."""
    denoiser = {"name": "dit", "width": 512, "depth": 6, "heads": 8, "patch_size": 4}
    encoder = {
        "name": "t5",
        "size": {"d_model": 256, "num_layers": 2, "vocab_size": 50_000},
        "tokenizer": "bytes",
    }
    stage = {"prediction": "flow", "schedule": {"name": "flow"}, "denoiser": denoiser}
    stage |= {"sampler": {"name": "ddim", "steps": 1}}
    spec = {
        "name": "large",
        "text_encoder": encoder,
        "stages": [{"name": n, "size": size, **stage} for n, size in (("base", 8), ("sr", 16))],
    }
    path = tmp_path / "large.yaml"
    path.write_text(json.dumps(spec))
    bare = recipe.load(path)
    text = bare.hollow_text_encoder()
    sizes = [text.dim * 50_000 * 4]
    for i, name in enumerate(("base", "sr")):
        network = bare.build_stage_denoiser(i, text)
        sizes.append(sum(p.numel() for p in network.parameters()) * 4)
        save_safetensors(tmp_path / f"{name}.safetensors", network.state_dict())
        spec["stages"][i]["weights"] = f"{name}.safetensors"
    path.write_text(json.dumps(spec))

    def peak(mode):
        words = [sys.executable, "-c", PROBE, str(path), mode]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    slack = 40e6  # libraries' own buffers, and pages that the system reads ahead
    kept, moved = peak("none"), peak("model")
    assert kept > 0.9 * sum(sizes)
    assert moved < max(sizes) + sizes[0] + slack  # the encoder's random table is drawn, then copied
    assert moved < kept - 0.5 * max(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["model", "layers"])
def test_on_a_gpu_parts_wait_in_main_memory(mode):
    expected = recipe.load("tiny").build("cuda")(PROMPTS).tensor
    pipeline = recipe.load("tiny", [f"offload={mode}"]).build("cuda")
    for _ in range(2):
        assert torch.equal(pipeline(PROMPTS).tensor, expected)
        assert not any(p.is_cuda for stage in pipeline.stages for p in stage.denoiser.parameters())
        assert not any(p.is_cuda for p in pipeline.text_encoder.parameters())

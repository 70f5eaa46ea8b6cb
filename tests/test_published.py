"""Published systems as recipes: they load without weights, cost what is published, and run in small."""

from __future__ import annotations

import pytest
import torch
from published_small import KL, SMALL

from imagen_kit import checkpoints, recipe
from imagen_kit.errors import KitError, RecipeError
from imagen_kit.labels import Labels
from imagen_kit.recipe import check, trial
from imagen_kit.weights import save_safetensors

# Per stage: parameters, and floating-point operations of one evaluation (None: no published figure). DiT's
# published "Gflops" are multiply-adds: 118.64 and 524.6.
FIGURES = {
    "dit-xl-2-256": [(675_129_632, 2 * 118.64e9)],
    "dit-xl-2-512": [(675_129_632, 2 * 524.6e9)],
    "adm-256": [(553_838_086, None)],
    "sd15": [(859_520_964, None)],
    "sdxl": [(2_567_463_684, None)],
    "pixart-alpha": [(611_349_152, None)],
    "sd3-medium": [(2_084_951_104, None)],
    "flux-dev": [(11_901_408_320, None)],
    "deepfloyd-if": [(4_304_695_110, 2.88e12), (1.2e9, None), (473_398_020, None)],
}
TABLES = {
    "dit-xl-2-256": 256 * 1152,
    "dit-xl-2-512": 256 * 1152,
    "sd3-medium": 192**2 * 1536,
}  # positions, in the file but not trained

KL_SIZES = {
    "channels": 4,
    "widths": [32, 32, 32, 32],
    "blocks": 1,
    "groups": 32,
    "scale": 0.18215,
    "shift": 0.0,
    "quant": True,
    "attend": True,
    "picture_channels": 3,
}


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures(name):
    system = recipe.load(name)
    labels = system.spec.labels
    assert len(system.stages) == len(FIGURES[name])
    for index, (parameters, flops) in enumerate(FIGURES[name]):
        encoder = system.hollow_text_encoder(index)
        with torch.device("meta"):
            module = system.build_stage_denoiser(index, encoder, weights=False)
        assert all(p.is_meta for p in module.parameters())
        count = sum(p.numel() for p in module.parameters()) + TABLES.get(name, 0)
        # whole numbers are those of the files, others are rounded to the digits that were published
        assert count == pytest.approx(parameters, rel=0 if isinstance(parameters, int) else 0.05)
        found = trial.flops(
            module,
            system.stages[index],
            check.dimensions(system.stages[index], index),
            system.denoiser_options(index, encoder),
            labels and labels.classes,
            0 if labels else encoder.max_length,
        )
        assert found is not None
        if flops is not None:
            assert found == pytest.approx(flops, rel=5e-3)  # the figures have three digits


@pytest.mark.parametrize("name", SMALL)
def test_runs_in_small(name):
    small = ["stages.0.weights=random", "stages.0.sampler.steps=2", *SMALL[name]]
    system = recipe.load(name, small)
    pipeline = system.build()
    prompt = "golden retriever" if system.spec.labels else "a red star"
    picture = pipeline(prompt, seed=3).tensor
    assert picture.shape == (1, 3, system.stages[-1].size, system.stages[-1].size)
    assert torch.isfinite(picture).all()


def test_weights_that_are_not_there_are_said_before_anything_is_built(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\.0\.weights: .*256x256_diffusion\.pt' do not exist"):
        recipe.load("adm-256").build()


# ---- labels ------------------------------------------------------------------------------------------------


def test_labels_are_numbers_or_names():
    labels = Labels(1000, "imagenet")
    assert labels(["207", "golden retriever", " Macaw ", ""]).labels.tolist() == [207, 207, 88, 1000]
    with pytest.raises(KitError, match="did you mean 'golden retriever'"):
        labels(["goldn retriever"])
    with pytest.raises(KitError, match="a number from 0 to 9"):
        Labels(10)(["10"])
    with pytest.raises(KitError, match="none for 'no class'"):
        Labels(10, null=False)([""])


def test_names_of_classes_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat, kitten\ndog\n", encoding="utf-8")
    assert Labels(2, tmp_path / "names.txt")(["kitten", "dog"]).labels.tolist() == [0, 1]
    with pytest.raises(KitError, match="2 names for 3 classes"):
        Labels(3, tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("name", "change", "path", "rule"),
    [
        ("adm-256", "stages.0.guidance=[cfg]", "stages.0.guidance.0", "labels.null"),
        ("adm-256", "labels.classes=10", "labels.names", "imagenet has 1000 classes, not 10"),
        (
            "adm-256",
            "stages.0.denoiser.name=adm_512;labels.classes=10;labels.names=",
            "labels.classes",
            "1000",
        ),
        ("sdxl", "stages.0.told={}", "stages.0.denoiser", r"give it \(b, 6\) numbers"),
        ("sdxl", "stages.0.told.size=[1, 2]", "stages.0", "6"),
        ("sd15", "stages.0.told.size=[1, 2]", "stages.0.told.size", "leave it out"),
        ("sd15", "labels={classes: 10}", "labels", "in place of text_encoder"),
    ],
)
def test_faults_are_found_without_weights(name, change, path, rule):
    with pytest.raises(RecipeError) as error:
        recipe.load(name, change.split(";"))
    assert any(fault.path.startswith(path) for fault in error.value.faults)
    assert error.match(rule)


@pytest.mark.parametrize(
    ("change", "path", "rule"),
    [
        ("stages.2.low_res.told=level", "stages.2.denoiser", "give it labels"),
        ("stages.1.low_res.told=label", "stages.1.denoiser", "give it low_res and low_res_level"),
        ("stages.2.denoiser.num_classes=", "stages.2.low_res.told", "reads no labels"),
        ("stages.1.low_res.schedule={name: cosine}", "stages.1.low_res", "must be discrete"),
        ("stages.2.low_res.schedule=", "stages.2.low_res", "give low_res.schedule too"),
        ("stages.2.low_res.schedule.name=scaled_linaer", "stages.2.low_res.schedule.name", "did you mean"),
        ("stages.2.low_res.tolld=label", "stages.2.low_res.tolld", "did you mean 'told'"),
        ("stages.0.low_res={align_corners: true}", "stages.0.low_res", "no picture before it"),
        ("stages.2.text_encoder.layerr=last", "stages.2.text_encoder.layerr", "did you mean 'layer'"),
        ("stages.1.sampler.steps=40", "stages.1.sampler", "list of 50 times: steps must be 50, not 40"),
    ],
)
def test_faults_of_a_cascade(change, path, rule):
    steps = [line for line in SMALL["deepfloyd-if"] if "stages.1.sampler" not in line]
    with pytest.raises(RecipeError) as error:
        recipe.load("deepfloyd-if", [*steps, change])
    assert any(fault.path.startswith(path) for fault in error.value.faults)
    assert error.match(rule)


def test_a_stage_of_labels_has_no_text_encoder():
    small = [*SMALL["adm-256"], "stages.0.text_encoder=t5"]
    with pytest.raises(RecipeError, match=r"stages\.0\.text_encoder: prompts are labels here"):
        recipe.load("adm-256", small)


# ---- weights -----------------------------------------------------------------------------------------------


def test_weights_of_any_format_fill_denoiser_and_codec(tmp_path):
    small = [*SMALL["sd15"], "stages.0.weights=random", "stages.0.sampler.steps=2"]
    torch.manual_seed(0)
    first = recipe.load("sd15", small).build()
    module, codec = first.stages[0].denoiser, first.stages[0].codec
    for network in (module, codec):
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.05)
    save_safetensors(tmp_path / "unet.safetensors", module.state_dict())  # the part's own tensors
    kl = checkpoints.Origin("codec", "kl", dict(KL_SIZES))
    checkpoints.save(codec, tmp_path / "vae", layout="diffusers", origin=kl)  # a community's folder
    codec_part = KL[:-1] + f", weights: {tmp_path / 'vae'}}}"
    weights = [
        *SMALL["sd15"],
        "stages.0.sampler.steps=2",
        f"stages.0.weights={tmp_path / 'unet.safetensors'}",
        f"stages.0.codec={codec_part}",
    ]
    again = recipe.load("sd15", weights).build()
    for one, other in ((module, again.stages[0].denoiser), (codec, again.stages[0].codec)):
        wanted, found = one.state_dict(), other.state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert torch.equal(first("a star", seed=1).tensor, again("a star", seed=1).tensor)

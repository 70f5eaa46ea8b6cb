"""Recipes: every fault at once with its path, overrides, wiring, plug-ins, and building."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest
import torch
import yaml

from imagen_kit import denoisers, recipe, schedules
from imagen_kit.errors import KitError, RecipeError
from imagen_kit.recipe import source
from imagen_kit.registry import Registry
from imagen_kit.weights import save_safetensors

TINY = {
    "name": "mine",
    "text_encoder": {"name": "t5", "weights": "random", "size": "tiny"},
    "stages": [
        {
            "name": "base",
            "size": 8,
            "schedule": {"name": "flow"},
            "prediction": "flow",
            "denoiser": {"name": "unet", "levels": [{"channels": 32, "blocks": 1}]},
            "sampler": {"name": "ddim", "steps": 2},
            "guidance": [{"name": "cfg", "scale": 2.0}],
        }
    ],
}


@pytest.fixture
def write(tmp_path):
    """A recipe file from a map or a text."""

    def make(content=TINY, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return make


def faults(path, *overrides):
    """path → message of every fault; the error itself is one line."""
    with pytest.raises(RecipeError) as error:
        recipe.load(path, overrides)
    assert "\n" not in str(error.value)
    return {fault.path: fault.message for fault in error.value.faults}


# ---- finding and reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_is_sound(name):
    checked = recipe.load(name)
    assert checked.spec.description, "imagen-kit list shows it"
    assert checked.stages or checked.train.task == "text"


def test_file_anywhere_is_loaded_like_a_shipped_one(write):
    assert recipe.load(write()).build()("a red star").tensor.shape == (1, 3, 8, 8)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(KitError, match="unknown recipe 'tyny'; did you mean 'tiny'"):
        recipe.load("tyny")


def test_missing_file_names_its_neighbour(write, tmp_path):
    write()
    with pytest.raises(KitError, match=r"mnie\.yaml does not exist; did you mean .*mine\.yaml\?"):
        recipe.load(tmp_path / "mnie.yaml")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("name: [a\nstages: 3", "line 2, column 7"),
        ("name: a\nname: b", "'name' is given twice"),
        ("- a\n- b", "not a map of keys"),
        ("", "not a map of keys"),
        ("name: \x00", "not YAML"),
        ("name: a\nstages: &all [*all]", "a value that contains itself"),
        ("stages: " + "[" * 2000, "too many brackets"),
    ],
)
def test_text_that_is_no_recipe(write, text, rule):
    with pytest.raises(KitError, match=rule) as error:
        recipe.load(write(text))
    assert "\n" not in str(error.value)


def test_not_utf8_is_said_plainly(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(KitError, match="not UTF-8"):
        recipe.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("-2E3", -2e3), ("1.5e2", 150.0), ("12", 12), ("1e", "1e")]
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert source.parse(f"a: {text}", "x")["a"] == value
    assert type(source.parse(f"a: {text}", "x")["a"]) is type(value)


def test_extending_merges_maps_and_replaces_lists_and_parts(write, tmp_path):
    write()
    (tmp_path / "below").mkdir()
    path = write(
        """
        extends: ../mine.yaml
        name: other
        text_encoder: {max_length: 9}
        train: {steps: 5}
        """,
        "below/child.yaml",
    )
    child, parent = recipe.load(path), recipe.load(tmp_path / "mine.yaml")
    assert child.name == "other"
    assert child.spec.text_encoder.options == {"weights": "random", "size": "tiny", "max_length": 9}
    assert child.stages == parent.stages
    assert child.train.steps == 5
    swap = write("extends: mine.yaml\ntext_encoder: {name: open_clip}", "swap.yaml")
    assert recipe.load(swap).spec.text_encoder.options == {}
    assert (
        recipe.load(write("extends: tiny\nname: mine2", "shipped.yaml")).stages == recipe.load("tiny").stages
    )


def test_extended_files_keep_their_own_folder(write, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"")
    write({**TINY, "stages": [{**TINY["stages"][0], "weights": "base.safetensors"}]})
    (tmp_path / "below").mkdir()
    child = recipe.load(write("extends: ../mine.yaml", "below/child.yaml"))
    assert child.weight_file(0) == tmp_path / "base.safetensors"


def test_extending_in_a_circle_is_noticed(write):
    write("extends: b.yaml", "a.yaml")
    with pytest.raises(KitError, match="extends this one in turn"):
        recipe.load(write("extends: a.yaml", "b.yaml"))


# ---- faults ------------------------------------------------------------------------------------------------


def test_all_faults_at_once_each_with_its_path(write):
    path = write(
        """
        nam: broken
        text_encoder: {name: t6}
        stages:
          - name: base
            size: big
            schedule: {name: flow, shft: 3}
            prediction: flw
            denoiser: {name: unet, head_dim: wide}
            sampler: {name: dimm, steps: 0}
            guidance: [{name: cfg, scale: much}, {name: cgf}]
          - name: sr
            size: 16
            prediction: v
            schedule: cosine
            sampler: ddim
        """
    )
    found = faults(path)
    expected = {
        "name": "is missing",
        "nam": "unknown key; did you mean 'name'?",
        "text_encoder.name": "unknown text encoder 't6'; did you mean 't5'?",
        "stages.0.size": "must be a whole number, not 'big'",
        "stages.0.schedule.shft": "schedule 'flow' has no option 'shft'; did you mean 'shift'?",
        "stages.0.prediction": "unknown prediction 'flw'; did you mean 'flow'?",
        "stages.0.denoiser.head_dim": "must be a whole number, not 'wide'",
        "stages.0.sampler.name": "unknown sampler 'dimm'; did you mean 'ddim'?",
        "stages.0.sampler.steps": "must be at least 1, not 0",
        "stages.0.guidance.0.scale": "must be a number, not 'much'",
        "stages.0.guidance.1.name": "unknown guidance 'cgf'; did you mean 'cfg'?",
        "stages.1.denoiser": "is missing",
    }
    assert found == expected


@pytest.mark.parametrize(
    ("override", "path", "rule"),
    [
        ("stages.0.weigths=a", "stages.0.weigths", "did you mean 'weights'"),
        ("stages=[]", "stages", "at least one stage"),
        ("stages.0.name=a.b", "stages.0.name", "letters, digits"),
        ("stages.0.size=true", "stages.0.size", "whole number"),
        ("stages.0.size='8'", "stages.0.size", "whole number"),
        ("stages.0.sampler=3", "stages.0.sampler", "a part: its name"),
        ("stages.0.sampler={steps: 3}", "stages.0.sampler.name", "is missing"),
        ("stages.0.low_res_level=0.5", "stages.0.low_res_level", "no picture before it"),
        ("stages.0.low_res_level=1.5", "stages.0.low_res_level", "at most 1"),
        ("text_encoder.max_length=long", "text_encoder.max_length", "whole number"),
        ("text_encoder=concat", "text_encoder", "needs the option 'encoders'"),
        ("text_encoder={name: concat, encoders: [{name: clp}]}", "text_encoder.encoders.0.name", "'clip'"),
        ("stages.0.guidance.0={name: interval, of: {name: cgf}}", "stages.0.guidance.0.of.name", "'cfg'"),
        ("stages.0.guidance.0.scale=.nan", "stages.0.guidance.0", "number"),
        ("stages.0.sampler.spacing=trialing", "stages.0.sampler", "did you mean 'trailing'"),
        ("stages.0.denoiser.levels=[{channels: 16, blcks: 1}]", "stages.0.denoiser", "blcks"),
        ("stages.0.denoiser.patch_size=3", "stages.0.denoiser", "multiples of 3"),
        ("stages.0.denoiser={name: dit_s_2, text_dpth: 2}", "stages.0.denoiser.text_dpth", "'text_depth'"),
        ("train.stpes=3", "train.stpes", "did you mean 'steps'"),
        ("train.steps=0", "train.steps", "at least 1"),
        ("train.times.mean=noisy", "train.times.mean", "must be a number"),
        ("train.optimizer.learning_rat=1", "train.optimizer.learning_rat", "did you mean 'learning_rate'"),
        ("train.stage=bsae", "train.stage", "did you mean 'base'"),
        ("unconditional=zero", "unconditional", "did you mean 'zeros'"),
    ],
)  # fmt: skip
def test_each_fault_is_named(write, override, path, rule):
    found = faults(write(), override)
    assert list(found) == [path]
    assert rule in found[path]


def test_sampler_that_does_not_fit_the_schedule(write):
    zero = {"name": "linear", "timesteps": 1000, "zero_terminal_snr": True}
    found = faults(
        write(), f"stages.0.schedule={zero}", "stages.0.prediction=v", "stages.0.sampler.name=heun"
    )
    assert list(found) == ["stages.0.sampler"]
    assert "'heun' does not fit schedule" in found["stages.0.sampler"]
    recipe.load(
        write(), [f"stages.0.schedule={zero}", "stages.0.prediction=v"]
    )  # ddim can begin at alpha = 0


def test_prediction_that_does_not_fit_the_schedule(write):
    zero = {"name": "linear", "timesteps": 1000, "zero_terminal_snr": True}
    found = faults(write(), f"stages.0.schedule={zero}", "stages.0.prediction=eps")
    assert list(found) == ["stages.0.prediction"]
    assert "alpha = 0" in found["stages.0.prediction"]


def test_stages_must_grow_and_have_their_own_names(write):
    stage = TINY["stages"][0]
    found = faults(write({**TINY, "stages": [stage, {**stage, "size": 4}]}))
    assert set(found) == {"stages.1.name", "stages.1.size"}


def test_no_weight_is_read_while_checking(write, monkeypatch):
    from imagen_kit.text_encoders.t5_network import T5Network

    monkeypatch.setattr(T5Network, "__init__", lambda *a, **k: pytest.fail("encoder was built"))
    checked = recipe.load(write(), ["stages.0.weights=absent.safetensors", "text_encoder.weights=no/where"])
    with pytest.raises(RecipeError, match=r"stages\.0\.weights: .*do not exist"):
        checked.build()


# ---- overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("stages.0.sampler.steps=7", lambda r: r.stages[0].sampler.steps == 7),
        ("stages.base.sampler.steps=7", lambda r: r.stages[0].sampler.steps == 7),
        ("stages.base.sampler=dpmpp_2m", lambda r: r.stages[0].sampler.name == "dpmpp_2m"),
        ("stages.0.sampler={name: ddim, eta: 1.0}", lambda r: r.stages[0].sampler.options == {"eta": 1.0}),
        ("stages.0.guidance.cfg.scale=5", lambda r: r.stages[0].guidance[0].options["scale"] == 5),
        (
            "stages.0.guidance.1=rescale",
            lambda r: [p.name for p in r.stages[0].guidance] == ["cfg", "rescale"],
        ),
        ("stages.0.guidance=[]", lambda r: r.stages[0].guidance == []),
        ("train.optimizer.learning_rate=1e-4", lambda r: r.train.optimizer.learning_rate == 1e-4),
        ("description=a = b", lambda r: r.spec.description == "a = b"),
    ],
)
def test_override(write, assignment, read):
    assert read(recipe.load(write(), [assignment]))


def test_override_goes_into_a_part_given_by_its_bare_name(write):
    path = write({**TINY, "stages": [{**TINY["stages"][0], "schedule": "flow"}]})
    assert recipe.load(path, ["stages.0.schedule.shift=3.0"]).stages[0].schedule.options == {"shift": 3.0}


@pytest.mark.parametrize(
    ("assignment", "rule"),
    [
        ("steps", "write it as key.key=value"),
        ("=3", "write it as key.key=value"),
        ("stages..size=3", "write it as key.key=value"),
        ("stages.bsae.size=3", "did you mean 'base'"),
        ("stages.7.size=3", "only 1 items"),
        ("stages.0.size.a=3", "has no keys"),
        ("stages.0.size=[3", "--set"),
    ],
)
def test_malformed_override(write, assignment, rule):
    with pytest.raises(KitError, match=rule) as error:
        recipe.load(write(), [assignment])
    assert "\n" not in str(error.value)


# ---- building ----------------------------------------------------------------------------------------------


def test_dimensions_are_wired(write):
    stage = TINY["stages"][0]
    data = {**TINY, "stages": [stage, {**stage, "name": "sr", "size": 16, "low_res_level": 0.1}]}
    pipeline = recipe.load(
        write(data), ["stages.1.denoiser={name: dit, width: 32, depth: 1, heads: 2}"]
    ).build()
    base, sr = (stage.denoiser for stage in pipeline.stages)
    assert base.inputs.low_res_channels == 0
    assert sr.inputs.low_res_channels == 3
    assert sr.inputs.context_dim == pipeline.text_encoder.dim
    assert base.time.scale == schedules.create("flow").time_scale


def test_a_typed_dimension_must_be_the_wired_one(write):
    checked = recipe.load(write(), ["stages.0.denoiser.context_dim=48"])
    with pytest.raises(
        RecipeError, match=r"denoiser\.context_dim: is 48, but the text encoder's is 64; leave it out"
    ):
        checked.build()
    recipe.load(write(), ["stages.0.denoiser.context_dim=64"]).build()


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone(write):
    checked = recipe.load(write())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = checked.build()
    assert torch.equal(torch.rand(3), expected)
    second = checked.build()
    for a, b in zip(
        first.stages[0].denoiser.parameters(), second.stages[0].denoiser.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_weight_files_lie_beside_the_recipe(write, tmp_path):
    checked = recipe.load(write(), ["stages.0.weights=w/base.safetensors"])
    module = recipe.load(write()).build_stage_denoiser(0)
    half = {key: value.to(torch.bfloat16) for key, value in module.state_dict().items()}
    save_safetensors(tmp_path / "w" / "base.safetensors", half)
    built = checked.build().stages[0].denoiser
    assert built.stem.weight.dtype == torch.float32
    assert all(torch.equal(half[key].float(), value) for key, value in built.state_dict().items())
    lowered = checked.build(dtype=torch.bfloat16).stages[0].denoiser  # but for its edges
    assert (lowered.down[0][0].res.conv1.weight.dtype, lowered.stem.weight.dtype) == (
        torch.bfloat16,
        torch.float32,
    )


def test_all_absent_or_damaged_weight_files_are_named_at_once(write, tmp_path):
    stage = TINY["stages"][0]
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    sr = {**stage, "name": "sr", "weights": "cut.safetensors"}
    checked = recipe.load(write({**TINY, "stages": [{**stage, "weights": "none.safetensors"}, sr]}))
    with pytest.raises(RecipeError) as error:
        checked.build()
    assert [fault.path for fault in error.value.faults] == ["stages.0.weights", "stages.1.weights"]


def test_checkpoint_of_another_shape_is_refused(write, tmp_path):
    other = recipe.load(write(), ["stages.0.denoiser.levels=[{channels: 64, blocks: 1}]"])
    save_safetensors(tmp_path / "base.safetensors", other.build_stage_denoiser(0).state_dict())
    with pytest.raises(KitError, match=r"do not fit UNet: .*misshapen \("):
        recipe.load(write(), ["stages.0.weights=base.safetensors"]).build()


# ---- other people's parts ----------------------------------------------------------------------------------


def test_another_distribution_adds_parts_through_entry_points(tmp_path, monkeypatch, write):
    (tmp_path / "foreign_parts.py").write_text(
        textwrap.dedent(
            '''
            import torch
            from imagen_kit import samplers

            class Foreign(torch.nn.Module):
                """A denoiser of another distribution."""

                def __init__(self, gain: float = 1.0, context_dim: int | None = None):
                    super().__init__()
                    self.gain, self.context_dim = torch.nn.Parameter(torch.tensor(gain)), context_dim

                def forward(self, x, t, cond=None):
                    return self.gain * x

            @samplers.register("foreign_ddim")
            def foreign_ddim(eta: float = 0.0):
                return samplers.create("ddim", eta=eta)
            '''
        )
    )
    info = tmp_path / "foreign_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[imagen_kit.denoisers]\nforeign = foreign_parts:Foreign\n[imagen_kit.samplers]\nx = foreign_parts\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from imagen_kit import samplers

    for package in (denoisers, samplers):  # as a fresh process would find them
        monkeypatch.setattr(package.registry, "_factories", dict(package.registry._factories))
        monkeypatch.setattr(package.registry, "_facts", dict(package.registry._facts))
        monkeypatch.setattr(package.registry, "_discovered", False)
    assert "foreign" in denoisers.names()
    assert denoisers.describe("foreign")["summary"] == "A denoiser of another distribution."
    swap = ["stages.0.denoiser={name: foreign, gain: 0.5}", "stages.0.sampler=foreign_ddim"]
    pipeline = recipe.load(write(), swap).build()
    assert pipeline.stages[0].denoiser.context_dim == pipeline.text_encoder.dim
    assert pipeline("a red star").tensor.shape == (1, 3, 8, 8)
    assert "gain" in " ".join(faults(write(), "stages.0.denoiser={name: foreign, gian: 1}").values())
    sys.modules.pop("foreign_parts")


def test_a_plug_in_that_does_not_load_is_named(tmp_path, monkeypatch):
    info = tmp_path / "broken_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[imagen_kit.codecs]\nbroken = no_such_module_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KitError, match=r"codec plug-in 'broken' .* does not load"):
        Registry("codec", "imagen_kit.codecs").names()


# ---- guidance ----------------------------------------------------------------------------------------------

ATTENTIVE = {"name": "unet", "levels": [{"channels": 32, "blocks": 1, "attention": True}]}


def guided(*strategies, **stage):
    """The tiny recipe with a stack of guidance, and other changes of its stage."""
    return {**TINY, "stages": [{**TINY["stages"][0], **stage, "guidance": list(strategies)}]}


@pytest.mark.parametrize(
    ("recipe_", "path", "message"),
    [
        (guided({"name": "autoguidance"}), "guidance.0", "needs the network 'weak'; given: none"),
        (
            guided({"name": "perp_neg", "negatives": ["blurry"]}),
            "guidance.0",
            "'blurry'; given: .*null, or text: and",
        ),
        (
            guided({"name": "compose", "weights": {"text: ": 1.0}}),
            "guidance.0",
            "'text:' must be followed by a text",
        ),
        (
            guided({"name": "compose", "weights": {"text:fog": "much"}}),
            "guidance.0.weights",
            "must be a number",
        ),
        (
            guided("cfg", {"name": "pag", "layers": "midle"}, denoiser=ATTENTIVE),
            "guidance.1",
            "did you mean 'middle'",
        ),
        (guided({"name": "slg", "layers": [99]}), "guidance.0", "slg: there is no layer 99; UNet has"),
        (guided({"name": "cfg_pp"}, sampler="heun"), "guidance.0", "which 'heun' has not; choose from"),
        (guided({"name": "interval", "of": {"name": "cfg_pp"}}, sampler="heun"), "guidance.0", "'heun'"),
        (guided({"name": "scheduled", "of": {"name": "cfgg"}}), "guidance.0.of.name", "did you mean 'cfg'"),
        (
            guided({"name": "scheduled", "of": {"name": "cfg"}, "shape": "up"}),
            "guidance.0",
            "guidance scale schedule",
        ),
        (guided("cfg", execution="batch"), "execution", "did you mean 'batched'"),
        (guided("cfg", networks={"weak": {"weights": "random"}}), "networks.weak.denoiser", "is missing"),
        (
            guided("cfg", networks={"weak": {"denoiser": "unett"}}),
            "networks.weak.denoiser.name",
            "did you mean 'unet'",
        ),
        (
            guided("cfg", networks={"weak": {"denoiser": {"name": "unet", "head_dim": 7}}}),
            "networks.weak.denoiser",
            "head_dim 7 must divide",
        ),
    ],
)
def test_guidance_that_cannot_work_is_a_fault(write, recipe_, path, message):
    found = faults(write(recipe_))
    assert list(found) == [f"stages.0.{path}"]
    assert re.search(message, found[f"stages.0.{path}"])


def test_every_strategy_from_a_recipe(write):
    stack = [
        {"name": "cads"},
        {"name": "scheduled", "of": {"name": "cfg", "scale": 5.0}, "shape": "oscillating", "hold": 1},
        {"name": "interval", "of": {"name": "slg", "layers": ["middle.res"]}, "high": 0.5, "by": "progress"},
        {"name": "cfg_zero", "scale": 2.0},
        {"name": "apg", "scale": 2.0, "momentum": -0.5, "norm": 5.0},
        {"name": "autoguidance", "scale": 1.5},
        {"name": "pag", "layers": "middle"},
        {"name": "perp_neg", "scale": 2.0, "negatives": ["uncond", "text:blurry"]},
        {"name": "compose", "weights": {"text:watercolour": 1.0}},
        {"name": "cfg_pp", "scale": 0.5},
        "rescale",
        "dynamic_threshold",
        "static_threshold",
    ]
    weak = {"denoiser": {"name": "unet", "levels": [{"channels": 16, "blocks": 1}], "head_dim": 16}}
    path = write(guided(*stack, denoiser=ATTENTIVE, networks={"weak": weak}, execution="split"))
    pipeline = recipe.load(path).build()
    images = pipeline(["a red star", "a dog"], also=[("snow", 0.5)], negative="dull")
    assert torch.isfinite(images.tensor).all()
    alone = pipeline("a dog", also=[("snow", 0.5)], negative="dull")
    assert torch.allclose(alone.tensor[0], images.tensor[1], atol=1e-4)  # float32 through 13 strategies
    assert sum(p.numel() for p in pipeline.stages[0].networks["weak"].parameters()) > 0


def test_weights_of_further_networks(write, tmp_path):
    weak = {"denoiser": dict(TINY["stages"][0]["denoiser"]), "weights": "weak.safetensors"}
    path = write(guided({"name": "autoguidance"}, networks={"weak": weak}))
    checked = recipe.load(path)
    with pytest.raises(RecipeError, match=r"stages\.0\.networks\.weak\.weights"):
        checked.build()
    module = checked.build_stage_denoiser(0, weights=False, network="weak")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    save_safetensors(tmp_path / "weak.safetensors", module.state_dict())
    stage = checked.build().stages[0]
    assert all((p == 0.25).all() for p in stage.networks["weak"].parameters())
    assert not all((p == 0.25).all() for p in stage.denoiser.parameters())

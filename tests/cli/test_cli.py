"""The command line: what it prints and writes, and one plain line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagen_kit
from imagen_kit import recipe
from imagen_kit.errors import KitError
from imagen_kit.images import Images
from imagen_kit.weights import save_safetensors

PROMPT = "a small red star on a white background"


@pytest.fixture
def refused(command, monkeypatch):
    """Run a command that must be refused before anything is sampled; the line it says."""

    def run(*words):
        monkeypatch.setattr(
            "imagen_kit.pipeline.Pipeline._latents", lambda *a, **k: pytest.fail("it sampled")
        )
        code, out, err = command(*words)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return run


# ---- generate ----------------------------------------------------------------------------------------------


def test_one_picture_to_a_file(command, tmp_path):
    code, out, _ = command("generate", PROMPT, "--recipe", "tiny", "-o", tmp_path / "a.png")
    assert code == 0
    assert str(tmp_path / "a.png") in out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (32, 32)
    assert len(list(tmp_path.iterdir())) == 1


def test_same_seed_same_bytes_and_num_counts_seeds_on(command, tmp_path):
    command("generate", PROMPT, "--recipe", "tiny", "--seed", 4, "-o", tmp_path / "one.png")
    code, _, _ = command(
        "generate", "a blue ring", PROMPT, "--recipe", "tiny", "--seed", 3, "--num", 2, "-o", tmp_path / "d"
    )
    assert code == 0
    made = sorted((tmp_path / "d").iterdir())
    assert len(made) == 4
    assert made[3].read_bytes() == (tmp_path / "one.png").read_bytes()
    # Two seeds, two pictures: the last layer of an untrained unet is zero, so prompts make no difference yet.
    assert len({path.read_bytes() for path in made}) == 2


def test_settings_reach_the_pipeline(command, tmp_path, monkeypatch):
    seen = {}

    def call(self, prompts, **settings):
        seen.update(stage=self.stages[0], prompts=prompts, **settings)
        return Images(torch.zeros(1, 3, 4, 4), list(prompts), [0])

    monkeypatch.setattr("imagen_kit.pipeline.Pipeline.__call__", call)
    words = ["--sampler", "ddim", "--steps", 3, "--guidance", 1.5, "--seed", 9, "--negative", "blur"]
    words += ["--also", "at 9:30, snow:0.5", "--also", "fog:-1"]
    code, _, _ = command("generate", PROMPT, "--recipe", "tiny", *words, "-o", tmp_path / "a.png")
    assert code == 0
    assert (seen["stage"].sampler.name, seen["stage"].steps) == ("ddim", 3)
    assert (seen["guidance"], seen["seed"], seen["negative"]) == (1.5, 9, "blur")
    assert seen["also"] == [("at 9:30, snow", 0.5), ("fog", -1.0)]


def test_swapped_sampler_keeps_the_spacing_that_both_know(command, tmp_path, monkeypatch):
    seen = []

    def build(self, *settings):
        seen.append(self.stages[0].sampler)
        raise KitError("seen")

    monkeypatch.setattr("imagen_kit.recipe.Recipe.build", build)
    keep = ["--set", "stages.0.sampler.spacing=log_snr", "--set", "stages.0.sampler.final=sigma_min"]
    swap = ["--sampler", "ddim", *keep]
    assert command("generate", PROMPT, "--recipe", "tiny", *swap, "-o", tmp_path / "a.png")[0] == 2
    assert (seen[0].name, seen[0].steps) == ("ddim", 4)
    assert seen[0].options == {"spacing": "log_snr", "final": "sigma_min"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "tyni"], "unknown recipe 'tyni'; did you mean 'tiny'"),
        (["--recipe", "tiny", "--sampler", "dpmp_2m"], "did you mean 'dpmpp_2m'"),
        (["--recipe", "tiny", "--set", "stages.0.denoiser.name=unte"], "did you mean 'unet'"),
        (["--recipe", "tiny", "--set", "stages.0.shedule=flow"], "unknown key; did you mean 'schedule'"),
        (
            ["--recipe", "tiny", "--set", "stages.0={name: base}"],
            "stages.0.size: is missing; stages.0.schedule: is",
        ),
        (["--recipe", "tiny", "--set", "stages.0.size=big"], "must be a whole number, not 'big'"),
        (["--recipe", "tiny", "--set", "stages"], "write it as key.key=value"),
        (["--recipe", "tiny", "--steps", "0"], "must be at least 1, not 0"),
        (["--recipe", "tiny", "--steps", "few"], "'--steps'"),
        (["--recipe", "tiny", "--guidance", "much"], "'--guidance'"),
        (["--recipe", "tiny", "--steps", "9999999999"], "steps must be at most 100,000, not 9,999,999,999"),
        (["--recipe", "tiny", "--guidance", "nan"], "must be a finite number"),
        (["--recipe", "tiny", "--guidance", "-1e39"], "must be a finite number of at most 1e+06"),
        (["--recipe", "tiny", "--also", "fog:nan"], "such as 'watercolour:2', not 'fog:nan'"),
        (["--recipe", "a" * 999 + ".yaml"], "recipe file aaa"),
        (
            ["--recipe", "tiny", "--also", "fog"],
            "--also must be TEXT:WEIGHT, such as 'watercolour:2', not 'fog'",
        ),
        (["--recipe", "tiny", "--set", "stages.0.guidance.cfg.scale=much"], "must be a number, not 'much'"),
        (["--recipe", "tiny", "--num", "0"], "--num must be at least 1"),
        (["--recipe", "tiny", "--num", "99999999999"], "--num must be at most 1000000"),
        (["--recipe", "tiny", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--recipe", "tiny", "--device", "meta"], "'meta' is not there"),
        (["--recipe", "tiny", "--device", "abacus"], "'abacus' is not there"),
        (["--recipe", "tiny", "--dtype", "bf61"], "did you mean 'bf16'"),
        (["--recipe", "tiny", "--sead", "3"], "No such option: --sead"),
    ],
)
def test_mistakes(refused, tmp_path, words, says):
    line = refused("generate", PROMPT, *words, "-o", tmp_path / "a.png")
    assert says.lower() in line.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompts", [[""], ["  \n"], ["a red star", ""]])
def test_empty_prompt(refused, tmp_path, prompts):
    assert f"prompt {len(prompts)} is empty" in refused(
        "generate", *prompts, "--recipe", "tiny", "-o", tmp_path / "a.png"
    )


def test_no_prompt_and_no_output(refused):
    assert "PROMPT" in refused("generate", "--recipe", "tiny", "-o", "a.png")
    assert "--output" in refused("generate", PROMPT)


def test_sampler_that_does_not_fit_the_schedule(refused, tmp_path):
    zero = "stages.0.schedule={name: linear, timesteps: 1000, zero_terminal_snr: true}"
    swap = ["--set", zero, "--set", "stages.0.prediction=v", "--sampler", "heun"]
    line = refused("generate", PROMPT, "--recipe", "tiny", *swap, "-o", tmp_path / "a.png")
    assert "'heun' does not fit schedule" in line


def test_unwritable_outputs(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for bad in (
        tmp_path / ("a" * 300 + ".png"),
        tmp_path / "link",
        tmp_path / "file" / "a.png",
        tmp_path / "a.gif",
        "/proc/none/a.png",
        tmp_path / "file" / "folder",
    ):
        assert "cannot write" in refused("generate", PROMPT, "--recipe", "tiny", "-o", bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file", "link"]


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "pickle", "absent"])
def test_bad_checkpoints(refused, tmp_path, damage):
    path = tmp_path / "base.safetensors"
    other = recipe.load("tiny", ["stages.0.denoiser.levels=[{channels: 64, blocks: 1}]"])
    save_safetensors(path, other.build_stage_denoiser(0, weights=False).state_dict())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "text":
        path.write_text("<html>404 not found, but the file was saved all the same</html>")
    elif damage == "pickle":
        torch.save({}, path)
    elif damage == "absent":
        path.unlink()
    says = {"cut": "truncated", "text": "not a safetensors file", "shape": "misshapen", "pickle": "pickled",
            "absent": "do not exist"}[damage]  # fmt: skip
    out = tmp_path / "a.png"
    line = refused("generate", PROMPT, "--recipe", "tiny", "--set", f"stages.0.weights={path}", "-o", out)
    assert says in line
    assert not out.exists()


def test_interrupted_sampling_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("imagen_kit.pipeline.Pipeline._latents", interrupt)
    code, _, err = command("generate", PROMPT, "--recipe", "tiny", "-o", tmp_path / "d" / "a.png")
    assert code == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---- list and show -----------------------------------------------------------------------------------------


def test_version_and_help(command):
    assert command("--version")[:2] == (0, f"imagen-kit {imagen_kit.__version__}\n")
    code, out, _ = command("--help")
    assert code == 0
    for name in ("generate", "list", "show", "train", "evaluate", "compare"):
        assert name in out
        code, text, _ = command(name, "--help")
        assert code == 0
        assert "Usage" in text
    assert command()[0] == 0


def test_unknown_command(refused):
    assert "generate" in refused("genrate", PROMPT)


def test_list_prints_every_part_with_a_summary(command):
    code, everything, _ = command("list")
    assert code == 0
    for kind in ("text_encoders", "denoisers", "samplers", "guidance", "schedules", "codecs", "recipes"):
        code, out, _ = command("list", kind)
        names = recipe.names() if kind == "recipes" else getattr(imagen_kit, kind).names()
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert all(len(line.split()) > 2 for line in lines), "a part without a summary"
        assert all(line.strip() in everything for line in lines)
    assert command("list", "sampler")[1] == command("list", "samplers")[1]


def test_list_of_an_unknown_kind(refused):
    assert "did you mean 'samplers'" in refused("list", "smaplers")


def test_show_recipe_counts_parameters_and_evaluations(command):
    code, out, _ = command("show", "tiny", "--set", "stages.0.sampler=heun", "--steps", 3)
    assert code == 0
    pipeline = recipe.load("tiny").build()
    count = sum(p.numel() for p in pipeline.stages[0].denoiser.parameters())
    assert f"{count / 1e3:.3g} k parameters" in out
    # 2·3 − 1 for heun, times cond and uncond
    assert "evaluations 5, each of 2 network passes (cond, uncond), 10 in all" in out
    assert "network passes a picture: 12" in out  # and 2 of the second stage
    for word in ("t5", "unet", "cosine", "prediction v", "dynamic_threshold", "noise level 0.1"):
        assert word in out


def test_show_a_recipe_with_existing_encoder_weights(command, tmp_path):
    encoder = recipe.load("tiny").build_text_encoder()
    settings = encoder.network.settings
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps(vars(settings)))
    save_safetensors(tmp_path / "t5" / "model.safetensors", encoder.network.state_dict())
    code, out, _ = command("show", "tiny", "--set", f"text_encoder={{name: t5, weights: {tmp_path / 't5'}}}")
    assert code == 0
    assert f"{sum(p.numel() for p in encoder.parameters()) / 1e3:.3g} k parameters" in out


def test_show_part_and_tableau(command):
    code, out, _ = command("show", "sampler", "ddim", "--steps", 3, "--schedule", "cosine")
    assert code == 0
    tableau = imagen_kit.samplers.create("ddim").tableau(imagen_kit.schedules.create("cosine"), 3)
    assert "3 network evaluations, order 1" in out
    assert all(str(row) in out for row in tableau.rows)
    code, out, _ = command("show", "guidance", "cfg")
    assert code == 0
    assert "scale" in out


@pytest.mark.parametrize("name", imagen_kit.guidance.names())
def test_show_guidance_says_what_it_costs(command, name):
    code, out, _ = command("show", "guidance", name)
    assert code == 0
    assert re.search(r"extra evaluations: (none|1|those of)", out)


def test_show_recipe_counts_what_guidance_evaluates_at_each_step(command):
    stack = [
        "{name: interval, of: {name: cfg, scale: 3.0}, high: 0.5, by: progress}",
        "{name: pag, layers: middle}",
        "{name: autoguidance}",
    ]
    weak = "{weak: {denoiser: {name: unet, levels: [{channels: 16, blocks: 1}], head_dim: 16}}}"
    changes = [f"stages.0.guidance=[{', '.join(stack)}]", f"stages.0.networks={weak}"]
    code, out, _ = command("show", "tiny", "--set", changes[0], "--set", changes[1])
    assert code == 0
    # of four steps the first three are in the interval, which ends with half of them taken
    assert (
        "evaluations 4, each of 3 to 4 network passes (cond, uncond, pag.cond.middle, weak.cond), 15 in all"
        in out
    )
    assert "network     weak: unet" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sampler", "dimm"], "did you mean 'ddim'"),
        (["smapler", "ddim"], "did you mean 'samplers'"),
        (["tyny"], "did you mean 'tiny'"),
        (["sampler", "ddim", "--steps", "3", "--schedule", "cosin"], "did you mean 'cosine'"),
        (["denoiser", "unet", "--steps", "3"], "--steps goes with"),
        (["denoiser", "unet", "--set", "a=b"], "--set changes recipes"),
    ],
)
def test_show_mistakes(command, words, says):
    code, _, err = command("show", *words)
    assert code == 2
    assert says in err


# ---- train, evaluate ---------------------------------------------------------------------------------------


def test_train_hands_over_its_settings(command, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("imagen_kit.training.run", lambda *a, **k: calls.append((a, k)), raising=False)
    code, _, _ = command(
        "train", "tiny", "-o", tmp_path / "r", "--resume", "--steps", 7, "--set", "train.seed=3"
    )
    assert code == 0
    assert calls == [
        (("tiny", tmp_path / "r"), {"resume": True, "overrides": ["train.seed=3", "train.steps=7"]})
    ]


def test_train_mistakes(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--steps must be at least 1" in refused("train", "tiny", "-o", tmp_path / "r", "--steps", 0)
    assert "cannot write" in refused("train", "tiny", "-o", tmp_path / "file" / "r")
    assert "did you mean 'tiny'" in refused("train", "tyni", "-o", tmp_path / "r")
    assert "say which stage to train: base, sr" in refused(
        "train", "tiny", "--set", "train.seed=1", "-o", tmp_path / "r"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluate_writes_what_it_prints(command, tmp_path):
    out = tmp_path / "report.json"
    code, text, _ = command("evaluate", "tiny", "-n", 2, "--languages", "en", "-o", out)
    assert code == 0
    assert out.read_text() == text
    assert '"recipe": "tiny"' in text


def test_evaluate_mistakes(refused, tmp_path):
    assert "did you mean 'held_out'" in refused("evaluate", "tiny", "--split", "heldout")
    assert "unknown language 'fr'" in refused("evaluate", "tiny", "--languages", "en,fr")
    assert "at least 1" in refused("evaluate", "tiny", "-n", 0)
    assert "--num must be at most 1000000" in refused("evaluate", "tiny", "-n", 10**12)
    assert "--seed must be at most 4294967295" in refused("evaluate", "tiny", "--seed", 2**32)
    assert "cannot write" in refused("evaluate", "tiny", "-o", tmp_path / "none" / "r.json")


# ---- as a process ------------------------------------------------------------------------------------------


def process(*words, **settings):
    code = "import sys; from imagen_kit.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_one_line_and_no_traceback_in_a_real_process(tmp_path):
    run = process("generate", PROMPT, "--recipe", "tiny", "--sampler", "dimm", "-o", str(tmp_path / "a.png"))
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert err == "error: recipe tiny: stages.0.sampler.name: unknown sampler 'dimm'; did you mean 'ddim'?\n"


def test_closed_pipe_is_quiet():
    run = process("list", "recipes")  # imagen-kit list | head
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    assert run.stderr.read() == ""


def test_help_is_quick_since_torch_stays_out():
    code = "import sys; from imagen_kit.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2]
    )

"""Loops that are recorded give the pictures of the plain ones; judged on the CPU by a tape in place of a CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tape_graph import Tape
from torch import Tensor, nn

from imagen_kit import caches, denoisers, samplers, schedules
from imagen_kit import loops as looping
from imagen_kit.conditioning import TextEmbeddings
from imagen_kit.loops import Loops
from imagen_kit.performance import Performance
from imagen_kit.pipeline import Pipeline
from imagen_kit.samplers import arena
from imagen_kit.stage import Stage

GRAPH = Performance(graph=True)


@pytest.fixture(autouse=True)
def sums_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """``arena`` sums small pictures by numpy, on the CPU alone; the tape hears nothing of that."""
    monkeypatch.setattr(arena, "fits", lambda plan, x: False)


def letters(texts: list[str]) -> TextEmbeddings:
    """A token a letter, up to four."""
    tokens, mask = torch.zeros(len(texts), 4, 8), torch.zeros(len(texts), 4, dtype=torch.bool)
    for i, text in enumerate(texts):
        for j, letter in enumerate(text[:4]):
            tokens[i, j] = torch.sin(torch.arange(8.0) * ord(letter))
            mask[i, j] = True
    return TextEmbeddings(tokens, mask)


def network(channels: int = 3, low_res: int = 0) -> nn.Module:
    torch.manual_seed(0)
    levels = [{"channels": 8, "blocks": 1}, {"channels": 8, "blocks": 1, "attention": True}]
    made = denoisers.create(
        "unet",
        out_channels=channels,
        levels=levels,
        head_dim=8,
        context_dim=8,
        low_res_channels=low_res,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def stage(**more: Any) -> Stage:
    options: dict[str, Any] = {
        "name": "base",
        "denoiser": network(),
        "schedule": schedules.create("cosine"),
        "prediction": "v",
        "sampler": samplers.create("ddpm"),
        "size": 8,
        "steps": 3,
        "guidance": (2.0,),
        "performance": GRAPH,
    }
    return Stage(**{**options, **more})


def cascade(**more: Any) -> list[Stage]:
    low = stage(**more)
    up = stage(
        name="up",
        denoiser=network(low_res=3),
        size=16,
        sampler=samplers.create("dpmpp_2m"),
        low_res_level=0.2,
    )
    return [low, up]


def pair(stages: list[Stage]) -> tuple[Pipeline, Pipeline]:
    """The plain pipeline and the recorded one, with the same networks."""
    plain = Pipeline(letters, [replace(part, performance=Performance()) for part in stages])
    recorded = Pipeline(letters, stages)
    recorded.loops = Loops(Tape)
    return plain, recorded


class Calls:
    """How often Python ran a network."""

    def __init__(self, module: nn.Module):
        self.count = 0
        module.register_forward_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.count += 1


def test_later_batches_replay_and_give_the_same_pictures() -> None:
    stages = cascade()
    plain, recorded = pair(stages)
    calls = Calls(stages[0].denoiser)
    for number, (prompts, seed) in enumerate([("ab", 1), ("cd", 2), ("x", 3), ("yes", 4)]):
        expected = plain(prompts, seed=seed, num=2)
        before = calls.count
        images = recorded(prompts, seed=seed, num=2)
        # the same operations on the same numbers
        assert torch.equal(images.tensor, expected.tensor), number
        assert calls.count - before == (3 if number < 2 else 0)


def test_batches_of_one_call_share_a_loop() -> None:
    plain, recorded = pair(cascade())
    options = {"num": 5, "seed": 7, "batch_size": 2}
    assert torch.equal(recorded("ab", **options).tensor, plain("ab", **options).tensor)
    shapes = [len(loop.kind[-1][0][0]) and loop.kind[-1][0][0][0] for loop in recorded.loops._loops]
    assert sorted(shapes) == [1, 1, 2, 2]  # a loop a stage for batches of two, and for the last picture
    assert [loop.recorded is not None for loop in recorded.loops._loops].count(True) == 2


@pytest.mark.parametrize("guidance", [(), (3.0, "rescale"), ("interval",), ("apg",)])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "learned"])
def test_samplers_and_guidance_are_recorded(sampler: str, guidance: tuple[Any, ...]) -> None:
    known = {
        "rescale": {"name": "rescale", "phi": 0.5},
        "interval": {"name": "cfg", "scale": 3.0, "interval": [0.3, 3.0]},
        "apg": {"name": "apg", "scale": 3.0, "momentum": -0.5},
    }
    more: dict[str, Any] = {"guidance": [known.get(part, part) for part in guidance]}
    if sampler == "learned":
        more |= {"sampler": samplers.create("ddpm", variance="learned_range"), "denoiser": network(6)}
    else:
        more |= {"sampler": samplers.create(sampler)}
    plain, recorded = pair([stage(**more)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            assert torch.equal(recorded("ab", seed=seed).tensor, plain("ab", seed=seed).tensor)
    assert recorded.loops._loops[0].recorded is not None


@pytest.mark.parametrize("cache", ["deep_cache", "interval", "taylor"])
def test_caches_with_a_fixed_rhythm_are_recorded(cache: str) -> None:
    plain, recorded = pair([stage(cache=caches.create(cache), steps=6)])
    for seed in range(3):
        assert torch.equal(recorded("ab", seed=seed).tensor, plain("ab", seed=seed).tensor)
    assert recorded.loops._loops[0].recorded is not None


def test_settings_and_shapes_make_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorded = pair([stage()])
    settings: list[dict[str, Any]] = [{}, {"steps": 4}, {"guidance": 5.0}, {"num": 2}, {"sampler": "ddim"}]
    for _ in range(3):
        for options in settings:
            assert torch.equal(recorded("ab", **options).tensor, plain("ab", **options).tensor)
    assert len(recorded.loops._loops) == len(settings)
    monkeypatch.setattr(looping, "LOOPS", 3)
    recorded("ab", steps=5)
    assert [loop.calls for loop in recorded.loops._loops] == [3, 3, 5]  # those used for the first time last
    recorded.to("cpu")
    assert not recorded.loops._loops


def test_weights_that_change_in_place_are_followed_and_others_recorded_anew() -> None:
    made = stage()
    plain, recorded = pair([made])
    for _ in range(2):
        recorded("ab")
    with torch.no_grad():
        for parameter in made.denoiser.parameters():
            parameter.mul_(1.1)
    assert torch.equal(recorded("ab").tensor, plain("ab").tensor)
    assert len(recorded.loops._loops) == 1
    weight = next(made.denoiser.parameters())
    weight.data = weight.data * 1.2
    assert torch.equal(recorded("ab").tensor, plain("ab").tensor)
    assert len(recorded.loops._loops) == 2


def test_a_replay_ticks_like_the_plain_loop() -> None:
    made, loops = stage(sampler=samplers.create("heun")), Loops(Tape)
    conds = {name: _cond(name) for name in ("cond", "uncond")}
    ticks = []
    for _ in range(3):
        before = len(ticks)
        draw = lambda: torch.zeros(1, 3, 8, 8)  # noqa: E731
        loops.sample(made, torch.ones(1, 3, 8, 8), conds, draw, [], lambda: ticks.append(1))
        assert len(ticks) - before == made.sampler.nfe(3)


def _cond(text: str) -> Any:
    from imagen_kit.conditioning import Cond

    found = letters([text])
    return Cond(found.tokens, found.mask)


class Waits(nn.Module):
    """A network that looks at its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x * self.weight if x.sum().item() > 0 else -x * self.weight


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "sampler": (
        {"sampler": samplers.create("dpm_adaptive", rtol=1.0, atol=1.0)},
        "sampler 'dpm_adaptive' decides on its steps",
    ),
    "guidance": (
        {"guidance": [2.0, {"name": "cads"}]},
        "its guidance draws noise",
    ),
    "network": (
        {"denoiser": Waits(), "guidance": ()},
        r"it cannot be recorded \(aten._local_scalar_dense.default is not permitted while a graph is recorded\)$",
    ),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(what: str) -> None:
    more, reason = OBSTACLES[what]
    plain, recorded = pair([stage(**more)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(3):
            assert torch.equal(recorded("ab", seed=seed).tensor, plain("ab", seed=seed).tensor)
    told = [warning for warning in told if "without a graph" in str(warning.message)]
    assert len(told) == 1
    with pytest.raises(UserWarning, match="stage 'base' runs without a graph: .*" + reason):
        raise told[0].message


def test_off_cuda_and_with_a_callback_the_loop_is_plain() -> None:
    made = stage()
    with pytest.warns(UserWarning, match="CUDA graphs are for CUDA devices, not cpu"):
        Pipeline(letters, [made])("ab")
    _, recorded = pair([made])
    seen: list[int] = []
    with pytest.warns(UserWarning, match="a callback is told of every step"):
        recorded("ab", callback=lambda stage, step, x, x0: seen.append(step))
    assert recorded.loops.obstacles == ["base: a callback is told of every step"]
    assert seen == [0, 1, 2]


def test_noise_that_would_fill_the_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looping, "NOISE_BYTES", 100)
    _, recorded = pair([stage()])
    with pytest.warns(UserWarning, match="its 2 noises take more than"):
        recorded("ab")


def test_every_part_is_placed_while_it_works() -> None:
    stages = [replace(part, performance=Performance()) for part in cascade()]
    order: list[str] = []

    class Watched(Pipeline):
        def placed(self, part: Any) -> Any:
            order.append(getattr(part, "name", type(part).__name__))
            return super().placed(part)

    Watched(letters, stages)("ab")
    codec = type(stages[0].codec).__name__
    assert order == ["function", "base", codec, "up", codec]


class Waiting:
    """Stands in for CUDA's telling of waits: one list a plain loop."""

    def __init__(self, *rounds: list[str]):
        self.rounds, self.looks = list(rounds), 0

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[list[str]]:
        self.looks += 1
        yield self.rounds.pop(0)


def test_a_loop_that_waits_at_its_first_call_alone_is_recorded_at_the_third(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, recorded = pair([stage()])
    waiting = Waiting(["a.py:1"], [])
    monkeypatch.setattr(looping, "waiting", waiting)
    calls = Calls(recorded.stages[0].denoiser)
    counts = []
    for seed in range(4):
        before = calls.count
        got = recorded("ab", seed=seed).tensor
        counts.append(calls.count - before)
        assert torch.equal(got, plain("ab", seed=seed).tensor)
    assert (waiting.looks, counts) == (2, [3, 3, 3, 0])  # looks twice, records, replays
    assert recorded.loops._loops[0].draws == 2


def test_a_loop_that_always_waits_is_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(device: torch.device) -> Tape:
        raise AssertionError("a recording that fails leaves the device in disorder")

    plain, recorded = pair([stage()])
    recorded.loops = Loops(graph)
    monkeypatch.setattr(looping, "waiting", Waiting(["a.py:1"], ["net.py:7", "net.py:9"]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(4):
            assert torch.equal(recorded("ab", seed=seed).tensor, plain("ab", seed=seed).tensor)
    said = [str(warning.message) for warning in told if "without a graph" in str(warning.message)]
    assert said == ["stage 'base' runs without a graph: it waits for the device (net.py:7)"]


def test_what_is_recorded_meets_the_layouts_of_the_plain_loop() -> None:
    """Compiled code is made for one layout; another would be compiled for amid the recording."""
    made = stage(told={"size": [8, 8, 1]}, guidance=())
    seen: list[list[tuple[Any, ...]]] = [[]]

    class Sees(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            given = {"x": x, "t": t, **cond.parts()}
            seen[-1].append(tuple((n, v.shape, v.stride(), v.dtype) for n, v in given.items()))
            return self.inner(x, t, replace(cond, size=None))

    _, recorded = pair([replace(made, denoiser=Sees(made.denoiser))])
    recorded("ab", num=2)
    seen.append([])
    recorded("ab", num=2)
    assert seen[0] == seen[1] != []
    sizes = {row[:3] for call in seen[0] for row in call if row[0] == "size"}
    assert sizes == {("size", (2, 3), (3, 1))}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_cuda_graph_gives_the_pictures_of_the_plain_loop(sampler: str) -> None:
    made = [replace(part, sampler=samplers.create(sampler)) for part in cascade()]
    plain = Pipeline(letters, [replace(part, performance=Performance()) for part in made]).to("cuda")
    recorded = Pipeline(letters, made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, prompt in enumerate(["ab", "cd", "x", "yes"]):
            # the same kernels, but for algorithms that cuDNN may choose anew
            torch.testing.assert_close(
                recorded(prompt, seed=seed).tensor, plain(prompt, seed=seed).tensor, rtol=1e-4, atol=1e-4
            )
    assert all(loop.recorded is not None for loop in recorded.loops._loops)

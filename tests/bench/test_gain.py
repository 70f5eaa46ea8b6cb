"""What an option gains: with and without it the same weights, prompts and noise, and nothing else that differs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from imagen_kit.bench.clock import Protocol
from imagen_kit.bench.counts import count_flops
from imagen_kit.bench.measure import Measurer
from imagen_kit.bench.subject import OURS, Case, Subject, Unavailable
from imagen_kit.bench.subjects import build, gain
from imagen_kit.bench.subjects.recipe import unrecorded
from imagen_kit.errors import KitError
from imagen_kit.text_encoders import create

CPU = torch.device("cpu")
TINY = {"size": "tiny", "steps": 3}
EQUAL = 1e-4  # float32 on both sides, sums in another order


def built(name="sd15", device=CPU, **options):
    return build(Case("gain", name, {**TINY, **options}), device)


def off(found, who=gain.WITHOUT):
    return float((found[who]() - found[OURS]()).abs().max())


def samples(subject):
    """What the networks are shown in one call."""
    subject.eager()
    return int(subject.note.rsplit(", ", 1)[1].split()[0])


class TestOptions:
    def test_each_goes_where_it_belongs(self):
        option = {
            "dtype": "bf16",
            "cache": {"name": "taylor", "order": 1},
            "execution": "split",
            "guidance": [{"name": "cfg", "scale": 2.0}],
            "offload": "model",
            "text_cache": 3,
            "set": ["stages.base.size=16"],
        }
        run, changes = gain.parted(option, "tiny")  # of two stages
        assert run == {"dtype": "bf16"}
        assert changes == [
            'stages.0.cache={"name": "taylor", "order": 1}',
            'stages.1.cache={"name": "taylor", "order": 1}',
            'stages.0.execution="split"',
            'stages.1.execution="split"',
            'stages.0.guidance=[{"name": "cfg", "scale": 2.0}]',
            'offload="model"',
            "text_encoder.cache=3",
            "stages.base.size=16",
        ]

    def test_what_a_recipe_has_unasked_is_off_in_the_other(self, monkeypatch):
        asked = []

        class Asking(gain.Asking):
            def __init__(self, wanted, settings, device):
                asked.append(wanted)
                super().__init__(wanted, settings, device)

        monkeypatch.setattr(gain, "Asking", Asking)
        built(option={"remember_text": True, "execution": "batched", "dtype": "bf16"})
        ours, other = asked
        assert ours.performance == {"remember_text": True, "dtype": "bf16"}
        assert other.performance == {"remember_text": False}
        assert ours.changes == ('stages.0.execution="batched"',)
        assert other.changes == ('stages.0.execution="split"',)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"option": {"dtpe": "bf16"}}, "unknown option of a gain 'dtpe'; did you mean 'dtype'"),
            ({"option": {"dtype": "bf61"}}, "did you mean 'bf16'"),
            ({"option": {"dtype": "bf16"}, "prompts": "sme"}, "did you mean 'same'"),
            ({"option": {"dtype": "bf16"}, "text": "onw"}, "did you mean 'own'"),
            ({"option": {"dtype": "bf16"}, "peers": "difusers"}, "did you mean 'diffusers'"),
            ({"option": {"text_cache": 1}}, "here text is given: text: own"),
            ({"option": {"offload": "model"}}, "give weights: real"),
        ],
    )
    def test_a_value_that_there_is_not(self, options, message):
        with pytest.raises(KitError, match=message) as error:
            built(**options)
        assert "\n" not in str(error.value)

    def test_what_this_device_has_not_is_a_row_that_says_so(self):
        for option, reason in (
            ({"graph": True}, "graph replays a CUDA graph"),
            ({"attention": "cudnn"}, "cudnn"),
        ):
            found = built(option=option)
            assert list(found) == [OURS]
            assert isinstance(found[OURS], Unavailable)
            assert reason in found[OURS].reason
        row = Measurer(build, CPU, Protocol(least=2))(
            Case("gain", "sd15", {**TINY, "option": {"graph": True}})
        )
        assert (row["status"], row["ratio"]) == ("skipped", {})


class TestPictures:
    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("sd15", {"execution": "batched"}),
            ("pixart-alpha", {"remember_text": True}),
            ("sd15", {"memory_format": "channels_last"}),
            ("dit-xl-2-256", {"attention": "eager"}),
        ],
    )
    def test_the_same_where_an_option_changes_no_numbers(self, name, option):
        found = built(name, option=option, batch=2)
        assert found[OURS]().std() > 0.05
        assert off(found) < EQUAL
        assert found[OURS].comparable
        assert found[gain.WITHOUT].comparable

    def test_others_by_design_and_by_precision(self):
        near, apart = (
            built(option=o) for o in ({"dtype": "bf16"}, {"cache": {"name": "deep_cache", "every": 2}})
        )
        assert 1e-4 < off(near) < 0.3  # eight bits of mantissa, guided over four steps
        assert "design" not in near[OURS].note
        assert off(apart) > 1e-3
        assert apart[OURS].note.endswith("other pictures by design")
        assert "design" not in apart[gain.WITHOUT].note

    def test_a_row_tells_time_over_time_and_difference(self):
        case = Case("gain", "dit-xl-2-256", {**TINY, "option": {"remember_text": True}})
        row = Measurer(build, CPU, Protocol(least=2, most=2, seconds=0))(case)
        assert row["status"] == "ok"
        assert row["ratio"][gain.WITHOUT] > 0
        assert row["difference"][gain.WITHOUT]["max_abs"] < EQUAL
        assert "samples through networks" in row["entries"][OURS]["note"]


class TestWork:
    def test_an_interval_saves_the_evaluations_outside(self):
        """cfg shows the network each sample twice, outside of the interval once."""
        low, high = 0.25, 0.75
        inner = {"name": "cfg", "scale": 7.5}
        limited = [{"name": "interval", "of": inner, "low": low, "high": high, "by": "progress"}]
        found = built(option={"guidance": limited}, set=["stages.0.sampler=ddim"], steps=8, batch=2)
        inside = sum(low < step / 8 <= high for step in range(8))
        assert samples(found[gain.WITHOUT]) == 2 * 2 * 8
        assert samples(found[OURS]) == 2 * (8 + inside)
        assert found[OURS].flops() < found[gain.WITHOUT].flops()

    def test_a_cache_saves_operations(self):
        found = built(option={"cache": {"name": "deep_cache", "every": 2}})
        assert found[OURS].flops() < 0.95 * found[gain.WITHOUT].flops()

    def test_remembered_text_saves_operations(self):
        found = built("pixart-alpha", option={"remember_text": True})
        assert found[OURS].flops() < found[gain.WITHOUT].flops()

    @pytest.mark.parametrize("prompts", gain.PROMPTS)
    def test_a_text_cache_saves_what_was_read_before(self, prompts):
        """Prompts of earlier calls are not encoded again, and the empty one is of every call."""
        found = built("pixart-alpha", option={"text_cache": 8}, text="own", prompts=prompts, batch=2)
        for subject in found.values():
            subject()
        encoder = create("t5", weights="random", size="tiny", max_length=120, cache=0, lowercase=True)
        words = [f"a large red star above a small blue ring, take 0.{i}" for i in range(2)]
        every = {"same": [*words, ""], "new": [*words, ""], "one": [words[0], ""]}[prompts]
        left = {"same": [], "new": words, "one": words[:1]}[prompts]
        want = count_flops(lambda: encoder(every)) - (count_flops(lambda: encoder(left)) if left else 0)
        assert found[gain.WITHOUT].flops() - found[OURS].flops() == want

    def test_offloaded_parts_are_not_held(self):
        """On a CPU they are made anew from their files: the same pictures bit for bit, fewer bytes held."""
        found = build(
            Case(
                "gain",
                "pocket-imagen",
                {"weights": "real", "steps": 1, "prompts": "new", "option": {"offload": "model"}},
            ),
            CPU,
        )
        assert torch.equal(found[OURS](), found[gain.WITHOUT]())
        ours, other = (sum(p.numel() for m in found[who].modules for p in m.parameters()) for who in found)
        assert ours == 0
        assert other > 5e6

    def test_prompts_of_the_nth_call_are_everyones(self):
        system = gain.Asking.__new__(gain.Asking)
        system.labels, system.settings = False, SimpleNamespace(batch=2)
        told = {way: [gain.Prompts(system, way) for _ in range(2)] for way in gain.PROMPTS}
        for way, (first, second) in told.items():
            calls = [first() for _ in range(3)]
            assert calls == [second() for _ in range(3)]
            assert len({*map(tuple, calls)}) == (1 if way == "same" else 3)
            assert all(len({*call}) == (1 if way == "one" else 2) for call in calls)
        assert told["same"][0]() == system.prompts
        system.labels = True
        assert gain.Prompts(system, "new")() == ["208", "209"]

    def test_what_is_counted_is_no_replay(self):
        """Operations are counted over a plain loop, and afterwards loops are recorded as before."""

        def graphs(system):
            return [stage.performance.graph for stage in system.pipeline.stages]

        asked = gain.Asked("sd15", "tiny", performance={"graph": True})
        system = gain.Asking(asked, gain.Settings(steps=2), CPU)
        assert graphs(system) == [True]
        with unrecorded(system):
            assert graphs(system) == [False]
        assert graphs(system) == [True]


@pytest.mark.parity
class TestDiffusers:
    """Without the option diffusers draws the same pictures."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("diffusers")

    @pytest.mark.parametrize(
        ("name", "prompts"), [("pixart-alpha", "new"), ("pixart-alpha", "one"), ("deepfloyd-if", "same")]
    )
    def test_prompts_read_in_every_call(self, name, prompts):
        found = built(name, option={"text_cache": 8}, text="own", prompts=prompts, batch=2, peers="diffusers")
        assert "encoding every prompt and the empty one" in found["diffusers"].note
        for _ in range(2):
            ours = found[OURS]()
            for who in (gain.WITHOUT, "diffusers"):
                assert (found[who]() - ours).abs().max() < EQUAL
        # prompts are padded there to their full length, and nothing is remembered
        assert found["diffusers"].flops() > found[gain.WITHOUT].flops() > found[OURS].flops()

    def test_the_usual_sampler_with_full_guidance(self):
        """DPM-Solver++(2M) on Karras' steps."""
        told = {"set": ["stages.0.sampler={name: dpmpp_2m, spacing: karras}"], "peers": "diffusers"}
        limited = built(option={"guidance": [{"name": "cfg", "scale": 7.5, "interval": [0.28, 2.9]}]}, **told)
        assert (limited["diffusers"]() - limited[gain.WITHOUT]()).abs().max() < EQUAL
        assert off(limited) > 0.01

    def test_embeddings_are_of_one_calls_prompts(self):
        found = built(option={"dtype": "bf16"}, prompts="new", peers="diffusers")
        assert isinstance(found["diffusers"], Unavailable)
        assert "prompts: same, or text: own" in found["diffusers"].reason

    def test_prompts_are_read_by_t5_alone(self):
        found = built(option={"text_cache": 1}, text="own", peers="diffusers")
        assert found["diffusers"].reason == "prompts are read there by T5, and the encoder here is 'clip'"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replayed_loop_draws_the_same():
    found = built(option={"graph": True}, device=torch.device("cuda"))
    assert all(isinstance(subject, Subject) for subject in found.values())
    for _ in range(3):  # plain, recorded, replayed
        assert off(found) < EQUAL
    assert found[OURS].flops() == found[gain.WITHOUT].flops()

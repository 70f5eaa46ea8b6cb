"""Repeats, spread and turns, with a clock whose times are given."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from imagen_kit.bench.clock import Protocol, Timing, begin, race, ratio, seconds
from imagen_kit.bench.subject import Subject
from imagen_kit.errors import KitError

CPU = torch.device("cpu")


class Idle(Subject):
    def __init__(self, own=None):
        self.calls, self.seconds = 0, own

    def __call__(self):
        self.calls += 1


def clock_of(times):
    """A clock that answers in turn; what it was asked is in the list beside it."""
    asked, given = [], itertools.cycle(times)

    def clock(subject, device, calls):
        asked.append((subject, calls))
        return next(given) * calls

    return clock, asked


def run(times, protocol, count=1):
    subjects = {str(i): Idle() for i in range(count)}
    begun = {key: Timing(9.0, []) for key in subjects}
    clock, asked = clock_of(times)
    race(subjects, begun, CPU, protocol, clock=clock)
    return subjects, begun, asked


def test_steady_times_need_no_more_than_the_least_repeats():
    _, begun, asked = run([1.0], Protocol(warm_up=3, least=4, most=50))
    assert begun["0"].values == [1.0] * 4
    assert len(asked) == 2 + 4  # the first call of the warm-up was made before
    assert begun["0"].steady(0.0)


def test_unsteady_times_go_on_to_the_most():
    _, begun, _ = run([1.0, 2.0, 4.0], Protocol(least=3, most=11, seconds=100))
    assert len(begun["0"].values) == 11
    assert not begun["0"].steady(0.05)


def test_time_runs_out_after_the_least_repeats():
    _, begun, _ = run([1.0, 2.0, 4.0], Protocol(least=3, most=11, seconds=0))
    assert len(begun["0"].values) == 3


def test_all_are_timed_in_turn_and_every_second_round_backwards():
    subjects, _, asked = run([1.0], Protocol(warm_up=2, least=2, most=2), count=3)
    a, b, c = subjects.values()
    assert [subject for subject, _ in asked] == [a, b, c, a, b, c, c, b, a]


def test_short_calls_are_timed_many_at_once():
    _, begun, asked = run([1e-4], Protocol(least=2, most=2))
    assert begun["0"].calls == 50  # 5 ms
    assert [calls for _, calls in asked] == [1, 50, 50]
    assert begun["0"].values == pytest.approx([1e-4, 1e-4])


def test_median_and_quartiles():
    timing = Timing(1.0, [5.0, 1.0, 2.0, 3.0, 4.0])
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert timing.steady(1 / 3)
    assert not timing.steady(0.33)
    assert Timing(1.0, [1.0, 1.0, 1.0, 100.0]).steady(0.05) is False


def test_a_ratio_is_taken_repeat_by_repeat():
    slowed = [1.0, 10.0, 2.0]  # the machine, not the work
    middle, (low, high) = ratio(Timing(0, [3 * s for s in slowed]), Timing(0, slowed))
    assert middle == low == high == pytest.approx(3.0)


def test_real_time_of_a_call():
    class Sleeper(Idle):
        def __call__(self):
            super().__call__()
            time.sleep(0.02)

    subject = Sleeper()
    assert seconds(subject, CPU, calls=3) >= 0.06
    assert subject.calls == 3
    assert begin(subject, CPU).first >= 0.02


def test_a_subject_that_times_itself_is_believed():
    assert seconds(Idle(own=7.0), CPU, calls=2) == 14.0


def test_protocols_are_checked():
    assert Protocol.of({"least": 4, "seconds": 1}) == Protocol(least=4, seconds=1)
    with pytest.raises(KitError, match="unknown key 'secnds'; did you mean 'seconds'"):
        Protocol.of({"secnds": 3})
    for bad, rule in (
        ({"least": 1}, "least must be at least 2"),
        ({"least": 5, "most": 4}, "most must be at least 5"),
        ({"warm_up": 0}, "warm_up must be at least 1"),
        ({"seconds": float("nan")}, "seconds must be at least 0"),
        ({"least": 2.5}, "least must be a whole number"),
        ({"seconds": "x"}, "seconds must be a number, not 'x'"),
    ):
        with pytest.raises(KitError, match=rule):
            Protocol.of(bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_cover_what_a_call_started():
    class Spin(Subject):
        def __call__(self):
            torch.cuda._sleep(20_000_000)

    assert seconds(Spin(), torch.device("cuda"), calls=2) > 2 * 20_000_000 / 5e9

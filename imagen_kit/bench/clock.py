"""How long work takes: repeats of all in turn, until the middle half lies close together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from imagen_kit.bench.subject import Subject
from imagen_kit.errors import KitError, unknown

Clock = Callable[[Subject, torch.device, int], float]
#: A repeat makes as many calls as take about this long, in seconds: far above what a clock resolves.
SHORTEST = 0.005


@dataclass(frozen=True)
class Protocol:
    """How rows are measured; written into every results file.

    Args:
        warm_up: calls of every entry before the first that counts, the very first (which may compile) included.
        least: fewest repeats.
        most: most repeats.
        seconds: no further repeat of a row begins after this time, though ``least`` of them there are.
        steady: enough repeats once the quartiles of every entry lie within this share of its median.
        energy_seconds: how long each entry runs for its energy to be read; 0 leaves energy out.
        limit: seconds after which a row is given up.
    """

    warm_up: int = 2
    least: int = 3
    most: int = 20
    seconds: float = 5.0
    steady: float = 0.05
    energy_seconds: float = 0.0
    limit: float = 600.0

    def __post_init__(self) -> None:
        bounds = {"warm_up": 1, "least": 2, "most": self.least, "seconds": 0, "steady": 0}
        for name, least in {**bounds, "energy_seconds": 0, "limit": 0}.items():
            value = getattr(self, name)
            whole = name in ("warm_up", "least", "most")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                kind = "whole number" if whole else "number"
                raise KitError(f"protocol: {name} must be a {kind}, not {value!r}")
            if not value >= least:
                raise KitError(f"protocol: {name} must be at least {least}, not {value}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Protocol:
        """From a map, e.g. a suite's; KitError with the nearest name for a key there is not."""
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise KitError("protocol: " + unknown("key", key, known))
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class Timing:
    """Seconds of single calls, each the mean of one repeat's.

    Attributes:
        first: seconds of the very first call.
        values: one a repeat.
        calls: made by each repeat.
    """

    first: float
    values: list[float]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the repeats; those of two are the two."""
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def steady(self, share: float) -> bool:
        """Whether the quartiles lie within a share of the median."""
        low, high = self.quartiles
        return max(self.median - low, high - self.median) <= share * self.median


def seconds(subject: Subject, device: torch.device, calls: int = 1) -> float:
    """Seconds of ``calls`` calls to the end of what they started: CUDA's events, the wall's clock on a CPU.

    A subject that times itself (``subject.seconds``) is believed.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        own = _calls(subject, calls)
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        taken = start.elapsed_time(end) / 1000
    else:
        began = time.perf_counter()
        own = _calls(subject, calls)
        taken = time.perf_counter() - began
    return taken if own is None else own


def _calls(subject: Subject, calls: int) -> float | None:
    own = 0.0
    for _ in range(calls):
        subject()
        own += subject.seconds or 0.0
    return own if subject.seconds is not None else None


def begin(subject: Subject, device: torch.device) -> Timing:
    """The first call, which may compile."""
    return Timing(seconds(subject, device), [])


def race(
    subjects: Mapping[str, Subject],
    begun: Mapping[str, Timing],
    device: torch.device,
    protocol: Protocol,
    warm: int = 1,
    clock: Clock = seconds,
) -> None:
    """Time all subjects in turn, so that all meet the same disturbances; every second round in reverse order.

    Args:
        subjects: who does the work.
        begun: their timings, to which the repeats are added.
        device: where they work.
        protocol: how often.
        warm: calls that were made before.
        clock: ``clock(subject, device, calls)`` → seconds of so many calls.
    """
    for key, subject in subjects.items():
        for _ in range(max(1, protocol.warm_up - warm)):
            last = clock(subject, device, 1)
        begun[key].calls = max(1, round(SHORTEST / max(last, 1e-7))) if last < SHORTEST else 1
    start = time.perf_counter()
    for repeat in range(protocol.most):
        for key in _turns(list(subjects), repeat):
            timing = begun[key]
            timing.values.append(clock(subjects[key], device, timing.calls) / timing.calls)
        enough = all(begun[key].steady(protocol.steady) for key in subjects) if repeat else False
        late = time.perf_counter() - start > protocol.seconds
        if repeat + 1 >= protocol.least and (enough or late):
            break


def _turns(keys: Sequence[str], repeat: int) -> Sequence[str]:
    return keys if repeat % 2 == 0 else keys[::-1]


def ratio(theirs: Timing, ours: Timing) -> tuple[float, tuple[float, float]]:
    """(median, quartiles) of theirs over ours, repeat by repeat: what slowed both down falls out."""
    pairs = Timing(1.0, [a / b for a, b in zip(theirs.values, ours.values, strict=True)])
    return pairs.median, pairs.quartiles

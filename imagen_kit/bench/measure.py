"""One row of a benchmark: a case is built, every entry is run, counted and timed beside the others.

What goes wrong is part of the row: memory that does not suffice, a peer that cannot be had, an error.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imagen_kit.bench import clock, counts
from imagen_kit.bench.clock import Protocol, Timing
from imagen_kit.bench.energy import Meter, find_meter, joules
from imagen_kit.bench.floor import Needed
from imagen_kit.bench.memory import Extra
from imagen_kit.bench.subject import OURS, Built, Case, Subject, Unavailable

OK, NO_MEMORY, FAILED, SKIPPED = "ok", "out of memory", "failed", "skipped"
#: What torch's allocators say when there is no more, besides the exceptions of their own.
COMPLAINTS = ("can't allocate memory", "out of memory", "not enough memory", "alloc_failed")
Row = dict[str, Any]


@dataclass
class _Entry:
    """One subject on its way through a row."""

    subject: Subject
    timing: Timing | None = None
    counted: counts.Counts | None = None
    out: Any = None
    extra: Extra | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def blank(case: Case, status: str, reason: str = "") -> Row:
    """A row without figures."""
    return {
        "id": case.id,
        "kind": case.kind,
        "name": case.name,
        "options": dict(case.options),
        "status": status,
        "reason": reason,
        "entries": {},
        "difference": {},
        "ratio": {},
        "ratio_quartiles": {},
    }


class Measurer:
    """Measures cases on one device.

    Args:
        build: ``build(case, device)`` → the subjects by name, see ``imagen_kit.bench.subjects``.
        device: where they work.
        protocol: how often.
        ceilings: of the device, see ``ceilings.measure``; {} leaves percentages out.
    """

    def __init__(
        self,
        build: Callable[[Case, torch.device], Built],
        device: torch.device,
        protocol: Protocol,
        ceilings: dict[str, Any] | None = None,
    ):
        self.build, self.device, self.protocol, self.ceilings = build, device, protocol, ceilings or {}
        self.meter: Meter | None = find_meter(device) if protocol.energy_seconds else None

    def __call__(self, case: Case) -> Row:
        """The finished row of a case; nothing that its work raises gets out."""
        row = blank(case, OK)
        entries: dict[str, _Entry] = {}
        try:
            torch.manual_seed(0)
            for who, subject in self.build(case, self.device).items():
                if isinstance(subject, Unavailable):
                    row["entries"][who] = {"status": SKIPPED, "reason": subject.reason}
                else:
                    entries[who] = _Entry(subject)
                    row["entries"][who] = {"status": OK}  # in the order given, whatever becomes of it
            self._run(row, entries)
        except Exception as error:
            row["status"], row["reason"] = fault(error)
        else:
            first = next(iter(row["entries"].values()), {"status": FAILED, "reason": "nothing was built"})
            row["status"], row["reason"] = first["status"], first.get("reason", "")
        finally:
            for entry in entries.values():
                entry.subject.close()
            entries.clear()
            free(self.device, compiled=True)
        return row

    def _run(self, row: Row, entries: dict[str, _Entry]) -> None:
        for who in list(entries):
            with self._guard(row, entries, who):
                self._begin(entries[who])
        row["difference"] = _differences(entries)
        for who in list(entries):
            entries[who].out = None
            with self._guard(row, entries, who):
                self._count(entries[who])
        while entries and not self._race(row, entries):
            pass  # whoever failed is out: the others begin anew
        for who in list(entries):
            with self._guard(row, entries, who):
                entry = entries[who]
                least = self.protocol.energy_seconds
                entry.figures["joules"] = joules(entry.subject, self.device, least, self.meter)
                self._conclude(row, who, entry)
        timings = {who: entry.timing for who, entry in entries.items() if entry.timing is not None}
        for who in timings if OURS in timings else ():
            if who != OURS:
                row["ratio"][who], row["ratio_quartiles"][who] = clock.ratio(timings[who], timings[OURS])

    @contextmanager
    def _guard(self, row: Row, entries: dict[str, _Entry], who: str) -> Iterator[None]:
        """What goes wrong inside is told by the entry, which then takes no further part."""
        try:
            yield
        except Exception as error:
            status, reason = fault(error)
            row["entries"][who] = {"status": status, "reason": reason}
        if row["entries"][who]["status"] != OK:
            entries.pop(who).subject.close()
            free(self.device)

    def _begin(self, entry: _Entry) -> None:
        """First call and a second one whose result and memory are looked at."""
        cuda = self.device.type == "cuda"
        with Extra(self.device) if cuda else _Nothing() as first:
            entry.timing = clock.begin(entry.subject, self.device)
        with Extra(self.device) as extra:
            entry.out = _kept(entry.subject())
            if cuda:
                torch.cuda.synchronize(self.device)
        entry.figures["least_bytes"] = counts.least_bytes(entry.subject, entry.out)
        if cuda:  # a graph holds what its capture took; on a CPU the first call is the compiler's
            extra.bytes = max(extra.bytes or 0, first.bytes or 0)
        entry.extra = extra
        if entry.subject.floor is not None and not cuda:
            with Extra(self.device, apart=False) as process:
                entry.subject()
            entry.figures["process"] = process.bytes

    def _count(self, entry: _Entry) -> None:
        subject = entry.subject
        weights = counts.weight_bytes(subject)
        entry.figures["weight_bytes"] = weights
        own = type(subject).flops is not Subject.flops
        try:
            if subject.countable:
                followed = [*subject.inputs, *(t for module in subject.modules for t in module.parameters())]
                entry.counted = counts.count(subject.eager, followed)
                entry.figures |= {"flops": entry.counted.flops, "waits": entry.counted.waits}
            if own:
                entry.figures["flops"] = subject.flops()
        except Exception as error:  # its time is worth having all the same
            entry.figures["uncounted"] = fault(error)[1]
            free(self.device)
        if self.device.type == "cuda":
            entry.figures["waits"] = counts.count_sync_warnings(subject)

    def _race(self, row: Row, entries: dict[str, _Entry]) -> bool:
        """Time all that are left; whether all came through."""
        running = ""

        def watched(subject: Subject, device: torch.device, calls: int) -> float:
            nonlocal running
            running = next(who for who, entry in entries.items() if entry.subject is subject)
            return clock.seconds(subject, device, calls)

        timings = {}
        for who, entry in entries.items():
            assert entry.timing is not None
            timings[who] = entry.timing
            entry.timing.values.clear()
        subjects = {who: entry.subject for who, entry in entries.items()}
        try:
            clock.race(subjects, timings, self.device, self.protocol, warm=2, clock=watched)
        except Exception as error:
            status, reason = fault(error)
            row["entries"][running] = {"status": status, "reason": reason}
            entries.pop(running).subject.close()
            free(self.device)
            return False
        return True

    def _conclude(self, row: Row, who: str, entry: _Entry) -> None:
        """The entry's figures as they are written down."""
        subject, timing, figures = entry.subject, entry.timing, entry.figures
        assert timing is not None
        seconds, extra = timing.median, entry.extra
        inputs = sum(map(counts.size, subject.inputs))
        held = figures["weight_bytes"] + inputs
        activations = extra.bytes if extra else None
        waits = figures.get("waits")
        flops, moved = figures.get("flops"), entry.counted.bytes if entry.counted else None
        precision = subject.precision or _precision(subject, self.device)
        row["entries"][who] = {
            "status": OK,
            "seconds": {
                "median": seconds,
                "quartiles": list(timing.quartiles),
                "least": min(timing.values),
                "repeats": len(timing.values),
                "calls": timing.calls,
                "warm_up": max(3, self.protocol.warm_up),
                "steady": timing.steady(self.protocol.steady),
            },
            "per_second": subject.units / seconds,
            "unit": subject.unit,
            "units": subject.units,
            "peak_bytes": None if activations is None else max(held + activations, subject.loading or 0),
            "activation_bytes": activations,
            "loading_bytes": subject.loading,
            "floor": _needed(entry, inputs),
            "reserved_bytes": extra.reserved if extra else None,
            "weight_bytes": figures["weight_bytes"],
            "parameters": _parameters(subject),
            "precision": precision,
            "flops": flops,
            "tflops": None if flops is None else flops / seconds / 1e12,
            "percent_of_matmul": self._share(flops, seconds, "matmul", precision, "flops"),
            "bytes": moved,
            "least_bytes": figures["least_bytes"],
            "gbps": None if moved is None else moved / seconds / 1e9,
            "percent_of_copy": self._share(moved, seconds, "copy", "bytes"),
            "least_percent_of_copy": self._share(figures["least_bytes"], seconds, "copy", "bytes"),
            "waits_per_step": None if waits is None else waits / (subject.steps or 1),
            "steps": subject.steps,
            "joules": figures["joules"],
            "compile_seconds": subject.compile_seconds + max(0.0, timing.first - seconds),
            "note": "; not counted: ".join(filter(None, (subject.note, figures.get("uncounted")))),
        }

    def _share(self, amount: int | None, seconds: float, *path: str) -> float | None:
        """Percent of a ceiling; None where either is not known."""
        top: Any = self.ceilings
        for key in path:
            top = top.get(key) if isinstance(top, dict) else None
        return 100 * amount / seconds / top if top and amount else None


class _Nothing:
    """Stands in for ``Extra`` where the peak is not looked at."""

    bytes = None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...


def fault(error: BaseException) -> tuple[str, str]:
    """(status, one plain line) of what was raised."""
    line = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in line.lower() for word in COMPLAINTS)
    ):
        return NO_MEMORY, line or type(error).__name__
    return FAILED, f"{type(error).__name__}: {line}" if line else type(error).__name__


def free(device: torch.device, compiled: bool = False) -> None:
    """Let go of memory that nothing refers to any more, and where asked of ``compiled`` code (everybody's)."""
    if compiled and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # type: ignore[attr-defined]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _precision(subject: Subject, device: torch.device) -> str:
    """What most products are computed in, going by the matrices among the weights; fp32 where there are none.

    Most: networks in low precision keep their first and last layers in float32.
    """
    sizes: dict[torch.dtype, int] = {}
    for weight in (p for module in subject.modules for p in module.parameters()):
        if weight.dim() > 1 and weight.is_floating_point():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    dtype = max(sizes, key=sizes.__getitem__, default=torch.float32)
    if dtype is torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


def _needed(entry: _Entry, inputs: int) -> dict[str, Any] | None:
    """The peak beside the floor, where that was measured; see ``imagen_kit.bench.floor.Needed``."""
    floor, extra = entry.subject.floor, entry.extra
    if floor is None or extra is None or extra.bytes is None:
        return None
    weights, process = entry.figures["weight_bytes"], entry.figures.get("process")
    held = weights + inputs
    whole = None if process is None else held + process
    return Needed(weights, inputs, **vars(floor), peak=held + extra.bytes, process=whole).as_dict()


def _parameters(subject: Subject) -> int:
    return sum(p.numel() for p in {id(p): p for m in subject.modules for p in m.parameters()}.values())


def _kept(out: Any) -> Any:
    """A copy of a result, which the next call (of a graph) might write over."""
    return out.detach().clone() if isinstance(out, Tensor) else out


def _differences(entries: dict[str, _Entry]) -> dict[str, dict[str, float]]:
    """How far each result is from the kit's, for those that should be the same.

    ``max_abs``: the largest difference of a number; ``relative``: that over the root mean square of the kit's
    result; ``rms``: the root mean square of the difference over that of the result.
    """
    if OURS not in entries or not isinstance(entries[OURS].out, Tensor):
        return {}
    ours = entries[OURS].out.double()
    scale = ours.square().mean().sqrt().clamp_min(1e-30)
    found = {}
    for who, entry in entries.items():
        out = entry.out
        if who == OURS or not entry.subject.comparable or not isinstance(out, Tensor):
            continue
        if out.shape != ours.shape:
            raise ValueError(f"{who} answers with {tuple(out.shape)}, {OURS} with {tuple(ours.shape)}")
        off = out.to(ours.device).double() - ours
        most, rms = off.abs().max(), off.square().mean().sqrt()
        found[who] = {"max_abs": most.item(), "relative": (most / scale).item(), "rms": (rms / scale).item()}
    return found

"""What samplers are compared on: a model of a recipe, or a problem whose ideal denoiser is known.

Axes: n pictures or samples, m real ones, c h w.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from imagen_kit.caches.base import StepCache
from imagen_kit.data.pocket import Scene, SceneBatch, caption, render
from imagen_kit.denoisers import analytic
from imagen_kit.errors import KitError
from imagen_kit.evaluation import spec
from imagen_kit.evaluation.drawing import Drawn, draw, fingerprint
from imagen_kit.evaluation.judge import Judge
from imagen_kit.evaluation.memory import PeakMemory
from imagen_kit.evaluation.pocket import draw_scenes, summary
from imagen_kit.guidance.base import renoised, rescaled_stack
from imagen_kit.pipeline import Pipeline
from imagen_kit.samplers import grid

Tick = Callable[[], None]
Cache = StepCache | str | None  # of the first stage; None for none, ``spec.OWN`` for the recipe's
POCKET = "pocket"
PROBE = 40  # steps; samplers that restart do so in many steps only
READABLE = 16  # pixels; the judge reads no smaller pictures
REAL_SEED = 2**32  # of the real pictures: far from any seed of drawn ones


class Subject(Protocol):
    """What ``compare.run`` asks of the thing it compares samplers on.

    Attributes:
        name: for titles.
        schedule: the schedule samplers run on.
        device: where it computes.
        n: pictures or samples of one cell.
        pictures: its results are pictures in [0, 1]; otherwise points.
        judged: ``judge`` has something to say.
        result: what the swapped sampler makes, in words, for labels.
        stages: more than one when its result is made into a larger one.
        side: of the last stage's pictures in pixels; 0 where there are none.
        reference: default of ``compare.run``'s option.
    """

    name: str
    schedule: Any
    device: torch.device
    n: int
    pictures: bool
    judged: bool
    result: str
    stages: int
    side: int
    reference: str

    def facts(self) -> dict[str, Any]:
        """What must be equal for numbers to stand in one table."""

    def keep(self) -> dict[str, Any]:
        """Grid options that a swapped sampler keeps."""

    def texts(self, seed: int) -> list[str]:
        """The prompts of repetition ``seed``, if any."""

    def check(self, sampler: Any, guidance: float | None, cache: Cache = spec.OWN) -> None:
        """KitError unless the sampler can be guided at this scale, and the network has a place for the cache."""

    def calls(self, sampler: Any, steps: int) -> int:
        """Network calls of ``draw``, for a progress bar."""

    def draw(
        self,
        sampler: Any,
        steps: int,
        guidance: float | None,
        seed: int,
        tick: Tick,
        cache: Cache = spec.OWN,
    ) -> Drawn:
        """The n results of one setting; ``cache`` is of the first stage, None for none."""

    def exact(self, seed: int) -> Drawn | None:
        """The exact solution for the noise of ``seed``; None where only a sampler can come near it."""

    def judge(self, drawn: Drawn, seed: int) -> dict[str, Any]:
        """What else there is to say about results, e.g. how many are right; may be empty."""

    def real(self, m: int) -> Tensor | None:
        """At most m samples of the data, of the shape of the results; None where there is none."""


class RecipeSubject:
    """A pipeline that draws captions of the pocket world, or prompts of one's own.

    Repetition s draws picture i from noise seed ``s * n + i``, and scenes of its own.

    Args:
        pipeline: the model; its first stage's sampler is swapped, later stages keep theirs.
        name: the recipe's name.
        n: pictures of a cell.
        split, language: of the captions, see ``pocket.evaluate``.
        prompts: texts to draw in place of pocket captions, over and over; nothing is judged then.
        batch_size: pictures at a time; None = all.
        data: the real pictures: ``pocket`` (rendered scenes of the split), a registered data set with options
            such as ``folder:path=DIR``; None = none.

    Raises:
        KitError: n below 1, an unknown split, an empty prompt, a data set that does not load.
    """

    pictures, reference = True, "dpmpp_3m@128"

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        name: str = "",
        n: int = 50,
        split: str = "held_out",
        language: str = "en",
        prompts: Sequence[str] | None = None,
        batch_size: int | None = 50,
        data: str | None = POCKET,
    ):
        draw_scenes(n, split, 0)  # n and split are checked at once
        if prompts is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise KitError("prompts must not be empty")
        self.pipeline, self.name, self.n, self.batch_size = pipeline, name or "model", n, batch_size
        self.split, self.language, self.data = split, language, data
        self.prompts = None if prompts is None else [prompts[i % len(prompts)] for i in range(n)]
        self.side = pipeline.stages[-1].size
        self.judged = prompts is None and self.side >= READABLE
        base = pipeline.stages[0]
        self.schedule, self.stages, self.device = base.schedule, len(pipeline.stages), pipeline.device
        self.result = f"{base.name}, {base.size} px" if self.stages > 1 else f"{base.size} px"
        self._real = None if data in (None, POCKET) else spec.create("data", str(data))

    def facts(self) -> dict[str, Any]:
        if self.prompts is None:
            drawn = {"split": self.split, "language": self.language}
        else:
            drawn = {"prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]}
        precision = str(self.pipeline.stages[0].dtype).removeprefix("torch.")
        return {
            "subject": self.name,
            "n": self.n,
            **drawn,
            "dtype": precision,
            "model": fingerprint(self.pipeline),
        }

    def keep(self) -> dict[str, Any]:
        return spec.grid_options(self.pipeline.stages[0].sampler)

    def calls(self, sampler: Any, steps: int) -> int:
        later = sum(evaluations(s.sampler, s.schedule, s.steps) for s in self.pipeline.stages[1:])
        return (evaluations(sampler, self.schedule, steps) + later) * -(
            -self.n // (self.batch_size or self.n)
        )

    def check(self, sampler: Any, guidance: float | None, cache: Cache = spec.OWN) -> None:
        base = self.pipeline.stages[0]
        own = base.guidance
        renoised(sampler, own if guidance is None else rescaled_stack(own, guidance))
        if isinstance(cache, StepCache):
            cache.fit(base.denoiser)

    def draw(
        self,
        sampler: Any,
        steps: int,
        guidance: float | None,
        seed: int,
        tick: Tick,
        cache: Cache = spec.OWN,
    ) -> Drawn:
        prompts, seeds = self.texts(seed), [seed * self.n + i for i in range(self.n)]
        return draw(self.pipeline, prompts, seeds, sampler, steps, guidance, self.batch_size, tick, cache)

    def exact(self, seed: int) -> Drawn | None:
        return None

    def texts(self, seed: int) -> list[str]:
        if self.prompts is not None:
            return self.prompts
        return [caption(scene, self.language) for scene in self._scenes(seed)]  # type: ignore[arg-type]

    def judge(self, drawn: Drawn, seed: int) -> dict[str, Any]:
        if not self.judged:
            return {}
        return summary(Judge().score(drawn.final, self._scenes(seed)), self._scenes(seed))

    def real(self, m: int) -> Tensor | None:
        size = self.side
        if self.data is None:
            return None
        if self._real is not None:
            files = getattr(self._real, "files", None)
            pictures = self._real.examples(m if files is None else min(m, len(files)), size).pictures
        else:
            scenes = SceneBatch.of(draw_scenes(m, self.split, REAL_SEED))
            pictures = render(scenes, size, torch.Generator().manual_seed(REAL_SEED))
        return pictures / 2 + 0.5

    def _scenes(self, seed: int) -> list[Scene]:
        return draw_scenes(self.n, self.split, seed)


class AnalyticSubject:
    """Data whose ideal denoiser is known, in float64: nothing but the sampler is judged.

    Args:
        name: see ``denoisers.analytic.problem``.
        schedule: a schedule's name with options, e.g. ``flow:shift=3``.
        n: samples of a cell.

    Raises:
        KitError: unknown problem or schedule, n below 1.
    """

    pictures, judged, stages, side, reference = False, False, 1, 0, "exact"

    def __init__(self, name: str, schedule: str = "flow", n: int = 1000):
        if n < 1:
            raise KitError(f"the number of samples must be a whole number of at least 1, not {n!r}")
        self.problem = analytic.problem(name)
        self.schedule = spec.create("schedule", schedule)
        self.name, self.n, self._schedule_text = f"analytic:{name}", n, schedule
        self.device, self.result = torch.device("cpu"), "samples"

    def facts(self) -> dict[str, Any]:
        return {"subject": self.name, "n": self.n, "schedule": self._schedule_text}

    def keep(self) -> dict[str, Any]:
        return {}

    def texts(self, seed: int) -> list[str]:
        return []

    def check(self, sampler: Any, guidance: float | None, cache: Cache = spec.OWN) -> None:
        if isinstance(cache, StepCache):
            raise KitError(f"{self.name} has no network whose blocks a cache could leave out")
        if guidance is not None:
            raise KitError(f"{self.name} has no guidance to scale; leave it out")

    def calls(self, sampler: Any, steps: int) -> int:
        return evaluations(sampler, self.schedule, steps)

    def draw(
        self,
        sampler: Any,
        steps: int,
        guidance: float | None,
        seed: int,
        tick: Tick,
        cache: Cache = spec.OWN,
    ) -> Drawn:
        ideal, calls = self.problem.denoise(self.schedule), 0

        def counted(x: Tensor, t: float | Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            tick()
            return ideal(x, t)

        start = sampler.points(self.schedule, steps)[0].t
        x = self._noise(seed) * self.schedule.prior_std(start)
        source = torch.Generator().manual_seed(seed + REAL_SEED)
        with PeakMemory(self.device) as memory, torch.no_grad():
            began = time.perf_counter()
            end = sampler.sample(counted, x, self.schedule, steps, generator=source)
            seconds = time.perf_counter() - began
        if not torch.isfinite(end).all():
            raise KitError(f"sampler {sampler.name!r} at {steps} steps gave values that are not finite")
        counts: dict[str, int] = {"samples": calls}
        return Drawn(end, end, counts, {"samples": float(calls)}, seconds, memory.bytes)

    def exact(self, seed: int) -> Drawn | None:
        schedule, end = self.schedule, grid.clean(self.schedule).t
        x = self._noise(seed) * schedule.prior_std(schedule.t_max)
        began = time.perf_counter()
        x = analytic.solve_ode(self.problem, x, schedule, schedule.t_max, end)
        alpha, sigma = schedule.alpha_sigma(end)
        if sigma > 0:  # the schedule stops short of the clean end; one evaluation leads there, as samplers do
            x = self.problem.x0(x, alpha, sigma)
        return Drawn(x, x, {}, {}, time.perf_counter() - began)

    def judge(self, drawn: Drawn, seed: int) -> dict[str, Any]:
        return {}

    def real(self, m: int) -> Tensor | None:
        return self.problem.sample(m, torch.Generator().manual_seed(REAL_SEED))

    def _noise(self, seed: int) -> Tensor:
        shape = (self.n, *self.problem.shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluations(sampler: Any, schedule: Any, steps: int | None) -> int:
    """Network calls of a run as far as they can be known before it: of an adaptive sampler one a step.

    Raises:
        KitError: the sampler does not fit the schedule, or has no such number of steps.
    """
    try:
        return exact_evaluations(sampler, schedule, steps)
    except NotImplementedError:  # the network's answers decide
        return len(sampler.points(schedule, steps)) - 1


def exact_evaluations(sampler: Any, schedule: Any, steps: int | None) -> int:
    """Network calls of a run; KitError also where they depend on what the network answers."""
    try:
        return sampler.tableau(schedule, steps).nfe
    except NotImplementedError:  # not linear, so without a tableau
        sampler.points(schedule, steps)
        return sampler.nfe(steps or sampler.default_steps)


def draws_noise(sampler: Any, schedule: Any) -> bool:
    """Whether a sampler with its options is stochastic: whether its tableau has noise."""
    try:
        return sampler.tableau(schedule, PROBE).noises > 0
    except KitError:  # not linear, or not to be had in so many steps
        return bool(getattr(sampler, "stochastic", False) or getattr(sampler, "eta", 0))


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank; KitError where there is none to read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(
            f"--prompts: cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not any(lines):
        raise KitError(f"--prompts: {path} holds no prompt")
    return [line for line in lines if line]

"""The path of a picture: prompt → text → stage after stage of a cascade → pictures.

Axes: b pictures of one batch, c h w latents, s side of a stage's picture.

Stages hand each other pictures in [-1, 1]. A picture is a function of its prompt, its seed and the settings
alone: each sample of each stage draws from a generator of its own, on the CPU, so that neither the batch, nor
the place in it, nor the device enters.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imagen_kit import samplers
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.base import TEXT, Guidance, build, number, renoised, rescaled_stack, stack
from imagen_kit.images import Images
from imagen_kit.loops import Loops, noise_source
from imagen_kit.performance.precision import restore
from imagen_kit.stage import Stage, check_count, start

if TYPE_CHECKING:
    from imagen_kit.performance.offload import Offload

Callback = Callable[[str, int, Tensor, Tensor], None]
Also = tuple[str | Sequence[str], float]


class Pipeline:
    """Prompts to pictures.

    Args:
        text_encoder: ``text_encoder(list[str]) -> TextEmbeddings``, or anything that answers with a ``Cond``
            (``imagen_kit.labels.Labels``: prompts are classes).
        stages: the cascade, base first.
        unconditional: what CFG takes for "no text": ``empty`` = the encoding of "" (DeepFloyd IF and most
            since), ``zeros`` = embeddings of zero (Imagen). As the denoisers were trained.

    Raises:
        KitError: no stages, two of one name, an unknown ``unconditional``.
    """

    def __init__(self, text_encoder: Any, stages: Sequence[Stage], unconditional: str = "empty"):
        if not stages:
            raise KitError("a pipeline needs at least one stage")
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise KitError(f"stages need names of their own, got {', '.join(names)}")
        if unconditional not in ("empty", "zeros"):
            raise KitError(unknown("unconditional embedding", unconditional, ("empty", "zeros")))
        self.text_encoder, self.stages, self.unconditional = text_encoder, list(stages), unconditional
        self.loops = Loops()
        #: Who keeps the parts' weights off the device between their turns; see ``imagen_kit.performance.offload``.
        self.offload: Offload | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoisers work."""
        if self.offload is not None:
            return self.offload.device
        return next((p.device for p in self.stages[0].denoiser.parameters()), torch.device("cpu"))

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoder, and those that stages have of their own."""
        return [self.text_encoder, *(s.text_encoder for s in self.stages if s.text_encoder is not None)]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move everything to a device and the denoisers to a dtype.

        Text encoder and codecs keep their own dtype policy; the state of the samplers is always float32.

        Raises:
            KitError: the pipeline is offloaded, and so is moved at every turn.
        """
        if self.offload is not None:
            raise KitError(
                "an offloaded pipeline moves its own parts; build it for the other device or dtype"
            )
        self.loops.clear()
        for part in (*self.text_encoders, *(stage.codec for stage in self.stages)):
            if isinstance(part, nn.Module):
                part.to(device=device)
        for stage in self.stages:
            for module in stage.modules:
                if dtype is not None:
                    restore(module)  # edges kept in float32 go along
                module.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        also: Sequence[Also] = (),
        seed: int | Sequence[int] = 0,
        num: int = 1,
        sampler: Any = None,
        steps: int | Mapping[str, int] | None = None,
        guidance: Any = None,
        batch_size: int | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Images:
        """Make ``num`` pictures of every prompt.

        Args:
            prompts: one or more texts.
            negative: what guidance leads away from in place of "no text": one text, or one a prompt.
            also: further prompts with their weights: ``[("watercolour", 2.0)]``, each one text, or one a
                prompt. They join in every guided stage: uncond + scale·(cond − uncond) + Σ weight·(prompt −
                uncond); a negative weight leads away.
            seed: one number, or one a prompt; picture j of a prompt has seed + j.
            num: pictures a prompt.
            sampler: another sampler for the first stage (a name or an object), or ``{stage name: sampler}``.
            steps: other numbers of steps, likewise.
            guidance: other guidance, likewise: a number (the scale of the strategies that have one; CFG where
                none has), a strategy, or a list of them.
            batch_size: most pictures at a time; None = all.
            progress: show a bar over network evaluations.
            callback: ``callback(stage name, step, x, x0)`` after every sampler step, on latents.

        Returns:
            ``len(prompts)·num`` pictures, those of one prompt together.

        Raises:
            KitError: an empty prompt, steps below 1, guidance that is not a number, that reads what the
                stage has not, or that does not fit its sampler, an unknown stage or sampler, a number of
                negatives or seeds that does not fit, pictures that are not finite.
        """
        texts = _texts(prompts, "prompt")
        away = _per_prompt(_texts(negative or "", "negative", may_be_empty=True), texts, "negative")
        check_count(num, "num")
        check_count(batch_size, "batch_size", optional=True)
        seeds = [s + j for s in _seeds(seed, texts) for j in range(num)]
        further = _weighted(also, texts)
        stages = self._settings(sampler, steps, guidance, further)
        for stage in stages:
            stage.require(["cond", "uncond", "null", *(name for name, _, _ in further)])
        # traced before any text is encoded: a sampler that does not fit its schedule is told at once
        starts = [start(stage) for stage in stages]
        owner = torch.arange(len(texts), device=self.device).repeat_interleave(num)
        rows = {"uncond": away, **{name: row for name, row, _ in further}}
        told = self._encode(texts, rows, stages, owner)
        size = batch_size or len(seeds)
        batches = [slice(i, min(i + size, len(seeds))) for i in range(0, len(seeds), size)]
        total = len(batches) * sum(calls for _, calls in starts) if progress else 0
        plan = [(stage, spread) for stage, (spread, _) in zip(stages, starts, strict=True)]
        pictures = []
        with _bar(total) as tick, _evaluating([module for stage in stages for module in stage.modules]):
            for part in batches:
                here = [{name: cond[part] for name, cond in conds.items()} for conds in told]
                pictures.append(self._run(plan, here, seeds[part], tick, callback))
        names = [text for text in texts for _ in range(num)]
        return Images(torch.cat(pictures).add(1).div(2), names, seeds)

    def _settings(
        self, sampler: Any, steps: Any, guidance: Any, further: list[tuple[str, list[str], float]]
    ) -> list[Stage]:
        """The stages with this call's settings, and with samplers that renoise as guidance asks for."""
        stages = list(self.stages)
        for i, name in self._chosen(sampler):
            stages[i] = replace(stages[i], sampler=name if hasattr(name, "sample") else samplers.create(name))
        for i, count in self._chosen(steps):
            stages[i] = replace(stages[i], steps=count)
        for i, wanted in self._chosen(guidance):
            many = isinstance(wanted, Guidance | Sequence) and not isinstance(wanted, str)
            new = stack(wanted) if many else rescaled_stack(stages[i].guidance, wanted)
            stages[i] = replace(stages[i], guidance=new)
        if further:
            joined = build({"name": "compose", "weights": {name: weight for name, _, weight in further}})
            if not any(stage.reads for stage in stages):
                raise KitError("further prompts act through guidance; give a guidance scale other than 1")
            stages = [
                replace(stage, guidance=(joined, *stage.guidance)) if stage.reads else stage
                for stage in stages
            ]
        return [replace(stage, sampler=renoised(stage.sampler, stage.guidance)) for stage in stages]

    def _chosen(self, setting: Any) -> list[tuple[int, Any]]:
        """(stage index, value) of a setting for the first stage or by stage name."""
        if setting is None:
            return []
        if not isinstance(setting, Mapping):
            return [(0, setting)]
        index = {stage.name: i for i, stage in enumerate(self.stages)}
        for name in setting:
            if name not in index:
                raise KitError(unknown("stage", name, index))
        return [(index[name], value) for name, value in setting.items()]

    def _encode(
        self, texts: list[str], rows: dict[str, list[str]], stages: list[Stage], owner: Tensor
    ) -> list[dict[str, Cond]]:
        """Each stage's conditionings; a text is encoded once by an encoder, and only if some stage reads it.

        Args:
            texts: the prompts.
            rows: the texts of other conditionings, one a prompt. ``null`` and ``text:...`` are known.
            owner: (pictures,) the prompt of every picture.
        """
        read = set().union(*(stage.reads for stage in stages))
        if any(rows["uncond"]) and "uncond" not in read:
            raise KitError("a negative prompt acts through guidance; give a guidance scale other than 1")
        rows = {"cond": texts, "null": [""] * len(texts), **rows}
        rows |= {
            name: [name.removeprefix(TEXT)] * len(texts) for name in sorted(read) if name.startswith(TEXT)
        }
        rows = {name: row for name, row in rows.items() if name == "cond" or name in read}
        unique = list(dict.fromkeys(itertools.chain.from_iterable(rows.values())))
        place = {text: i for i, text in enumerate(unique)}
        of = {
            name: torch.tensor([place[text] for text in row], device=self.device)[owner]
            for name, row in rows.items()
        }
        encoders = [self.text_encoder if s.text_encoder is None else s.text_encoder for s in stages]
        different = {id(encoder): encoder for encoder in encoders}
        found = {key: self._embedded(encoder, unique) for key, encoder in different.items()}
        return [{name: found[id(encoder)][index] for name, index in of.items()} for encoder in encoders]

    def _embedded(self, encoder: Any, texts: list[str]) -> Cond:
        """What an encoder makes of different texts, "" among them as ``unconditional`` says."""
        with self.placed(encoder):
            found = encoder(texts)
        if not isinstance(found, Cond):
            found = Cond(found.tokens, found.mask, found.pooled)
        every = found.to(self.device)
        if self.unconditional == "zeros" and "" in texts:
            blank = torch.tensor([texts.index("")], device=self.device)
            tokens, pooled = (
                v if v is None else v.index_fill(0, blank, 0) for v in (every.tokens, every.pooled)
            )
            every = replace(every, tokens=tokens, pooled=pooled)
        return every

    def _run(
        self,
        plan: list[tuple[Stage, float]],
        told: list[dict[str, Cond]],
        seeds: list[int],
        tick: Callable[[], None],
        callback: Callback | None,
    ) -> Tensor:
        """One batch, (b, 3, s, s) in [-1, 1]: stages start from noise of a spread, ``told`` is each one's."""
        picture: Tensor | None = None
        for i, (stage, spread) in enumerate(plan):
            with self.placed(stage):
                latents = self._latents(i, stage, spread, told[i], picture, seeds, tick, callback)
            with self.placed(stage.codec):
                picture = stage.codec.decode(latents).float()
            del latents
            if not torch.isfinite(picture).all():
                raise KitError(f"stage {stage.name!r} gave values that are not finite (in {stage.dtype})")
            picture = picture.clamp(-1, 1)
        assert picture is not None
        return picture

    def _latents(
        self,
        i: int,
        stage: Stage,
        spread: float,
        told: dict[str, Cond],
        picture: Tensor | None,
        seeds: list[int],
        tick: Callable[[], None],
        callback: Callback | None,
    ) -> Tensor:
        """Latents (b, c, h, w) of stage i, which is shown the picture (b, 3, s, s) before it."""
        side = stage.size // stage.codec.factor
        generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for seed in seeds]
        draw = noise_source(generators, (stage.codec.channels, side, side), self.device)
        x = draw() * spread
        here = {name: cond.to(dtype=stage.dtype) for name, cond in told.items()}
        if picture is not None:
            aux = noise_source(generators, (picture.shape[1], side, side), self.device)()
            shown: dict[str, Any] = dict(stage.low_res(picture, side, stage.low_res_level, aux))
            shown["low_res"] = shown["low_res"].to(stage.picture_dtype)
            here = {name: replace(cond, **shown) for name, cond in here.items()}
        here = {name: _told(cond, stage.told) for name, cond in here.items()}
        drawing = [torch.Generator().manual_seed(derive_seed(seed, i, "guidance")) for seed in seeds]
        report = None if callback is None else functools.partial(callback, stage.name)
        return self.loops.sample(stage, x, here, draw, drawing, tick, report)

    def placed(self, part: Any) -> contextlib.AbstractContextManager[object]:
        """A block of code in which a part (text encoder, stage, codec) is on the device.

        Without ``offload`` all parts always are. A text encoder sees to itself: it may remember the prompts.
        """
        if self.offload is None or any(part is encoder for encoder in self.text_encoders):
            return contextlib.nullcontext()
        return self.offload.turn(*(part.modules if isinstance(part, Stage) else [part]))


def derive_seed(seed: int, stage: int, purpose: str = "") -> int:
    """A seed for one stage of one picture (and purpose): 63 bits of SHA-256, so that no two are related."""
    told = f"{seed}:{stage}" + (f":{purpose}" if purpose else "")
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1


def _told(cond: Cond, told: Mapping[str, Any]) -> Cond:
    """``cond`` with the stage's numbers, the same for every picture."""
    first = next(value for value in (cond.tokens, cond.labels) if value is not None)
    rows: dict[str, Any] = {}
    for name, value in told.items():
        row = torch.tensor(value, dtype=torch.float32, device=first.device)
        rows[name] = row.expand(len(first), *row.shape)
    return replace(cond, **rows)


def _texts(texts: str | Sequence[str], what: str, may_be_empty: bool = False) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise KitError(f"no {what} given")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise KitError(f"{what} {i + 1} must be a text, got {text!r}")
        if not text.strip() and not may_be_empty:
            raise KitError(f"{what} {i + 1} is empty")
    return found


def _per_prompt(values: list[Any], texts: list[str], what: str) -> list[Any]:
    if len(values) == 1:
        return values * len(texts)
    if len(values) != len(texts):
        raise KitError(f"{len(values)} values of {what} for {len(texts)} prompts; give one, or one a prompt")
    return values


def _weighted(also: Sequence[Also], texts: list[str]) -> list[tuple[str, list[str], float]]:
    """(name, texts one a prompt, weight) of every further prompt."""
    found = []
    for i, item in enumerate(also):
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
            raise KitError(f"a further prompt is a pair (text, weight), got {item!r}")
        rows = _per_prompt(_texts(item[0], "further prompt"), texts, "further prompts")
        found.append((f"also{i}", rows, number(item[1], f"weight of further prompt {i + 1}")))
    return found


def _seeds(seed: int | Sequence[int], texts: list[str]) -> list[int]:
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise KitError(f"seed must be a whole number, got {value!r}")
    return _per_prompt(seeds, texts, "seed")


@contextlib.contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Dropout and the like off, and afterwards as it was: sampling amid training changes nothing."""
    training = [part for module in modules for part in module.modules() if part.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over ``total`` network evaluations, or nothing when that is 0; yields its tick."""
    if not total:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)

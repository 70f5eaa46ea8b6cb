"""What an option gains: a recipe's pictures drawn with it, and by the very same pipeline without it.

Both have the same weights, prompts and noise, so that the row tells time over time, memory over memory, and how far
the pictures are from each other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit.bench.peers import pipelines
from imagen_kit.bench.subject import OURS, Built, Unavailable
from imagen_kit.bench.subjects import register
from imagen_kit.bench.subjects.recipe import theirs, twins, unrecorded, words
from imagen_kit.bench.subjects.text_encoder import t5
from imagen_kit.bench.systems import Asked, Settings, System
from imagen_kit.bench.work import Work, attempt, chosen_peers
from imagen_kit.errors import KitError, unknown
from imagen_kit.performance import Performance
from imagen_kit.recipe import source

#: The same pipeline without the option.
WITHOUT = "without"
PEERS = ("diffusers",)
#: Prompts of the calls: those of the call before, others, or others of which all pictures of a call share one.
PROMPTS = ("same", "new", "one")
#: Options beside those of ``performance`` → what is changed in a recipe; {} stands for every stage.
PATHS = {
    "cache": "stages.{}.cache",
    "execution": "stages.{}.execution",
    "guidance": "stages.0.guidance",
    "offload": "offload",
    "text_cache": "text_encoder.cache",
}
#: What stands in the place of an option that a recipe has unasked.
OFF: dict[str, Any] = {
    "remember_text": False,
    "prepack": False,
    "codec_dtype": "fp32",
    "execution": "split",
    "text_cache": 0,
}
#: Options that draw other pictures, by design.
OTHERS = ("cache", "guidance")


@register("gain")
def gain(
    name: str,
    device: torch.device,
    *,
    option: Mapping[str, Any],
    size: str = "full",
    set: Sequence[str] = (),
    stages: int | None = None,
    weights: str = "random",
    text: str = "given",
    prompts: str = "same",
    steps: int | None = None,
    batch: int = 1,
    dtype: str = "fp32",
    performance: Mapping[str, Any] | None = None,
    peers: str = "none",
) -> Built:
    """Drawing a batch of pictures with an option, and without it.

    Args:
        name: a shipped recipe's, or a file.
        device: where.
        option: what is tried. Of ``performance``: dtype, memory_format, compile, quantise, attention, graph,
            remember_text and so on; ``cache`` (a part) and ``execution`` of all stages, ``guidance`` (parts) of the
            first; ``offload``; ``text_cache``: prompts that the text encoder remembers; ``set``: changes as
            ``--set`` takes them. What a recipe has unasked (remember_text, batched execution, a text cache) is
            off in the other pipeline, everything else there as the recipe has it.
        size, set, stages, weights, steps, batch, dtype, performance: of both, see the kind ``recipe``.
        text: with random weights ``given``, or read by the recipe's ``own`` encoder.
        prompts: ``same`` at every call, ``new`` at every call, or ``one`` new one for all pictures of a call.
        peers: none, or diffusers: without the option, and with ``text: own`` encoding the prompts of every call.

    Raises:
        KitError: a value that there is not.
    """
    wanted = chosen_peers(peers, PEERS)
    if prompts not in PROMPTS:
        raise KitError(unknown("prompts of a gain", prompts, PROMPTS))
    if text == "given" and weights == "random" and "text_cache" in option:
        raise KitError("text_cache is of a text encoder, and here text is given: text: own")
    base = dict(performance or {})

    def system(told: Mapping[str, Any]) -> Asking:
        run, changes = parted(told, name)
        run = base | run
        asked = Asked(name, size, (*set, *changes), stages, weights, run or None, text)
        return Asking(asked, Settings(None, steps, None, batch, dtype), device)

    other = {key: OFF[key] for key in option if key in OFF}
    note = ", other pictures by design" if any(key in OTHERS for key in option) else ""
    return _built(system(option), system(other), prompts, wanted, note)


def _built(tried: Asking, other: Asking, prompts: str, wanted: Sequence[str], note: str) -> Built:
    """Who draws: with the option, without it, and diffusers where it is wanted."""
    ready = attempt(partial(_begun, tried))
    if isinstance(ready, Unavailable):
        return {OURS: ready}
    copies = attempt(partial(_copies, other, prompts)) if wanted else None
    other.run_as_told()
    built: Built = {OURS: Drawn(tried, prompts, note), WITHOUT: Drawn(other, prompts)}
    if isinstance(copies, Unavailable):
        built[PEERS[0]] = copies
    elif copies is not None:
        model, codec, reader = copies
        built[PEERS[0]] = attempt(partial(theirs, other, model, codec, reader=reader))
    return built


def parted(option: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """(what of an option is of ``performance``, the rest as changes to the recipe ``name``).

    Raises:
        KitError: an option that there is not.
    """
    run = {field.name for field in fields(Performance)}
    count = len(source.read(source.find(name)).get("stages", []))
    changes: list[str] = []
    for key, value in option.items():
        if key == "set":
            changes += value
        elif key in PATHS:
            places = range(count) if "{}" in PATHS[key] else range(1)
            changes += [f"{PATHS[key].format(place)}={json.dumps(value)}" for place in places]
        elif key not in run:
            raise KitError(unknown("option of a gain", key, [*sorted(run), *PATHS, "set"]))
    return {key: value for key, value in option.items() if key in run}, changes


def _begun(system: System) -> System:
    """The system as it is to run; KitError for what this device has not."""
    system.run_as_told()
    if system.device.type != "cuda" and any(s.performance.graph for s in system.pipeline.stages):
        raise KitError(f"graph replays a CUDA graph, and this is a {system.device.type} device")
    return system


def _copies(system: Asking, prompts: str) -> tuple[Any, ...]:
    """diffusers' network and autoencoder, and, where text is not given, who reads prompts there."""
    encoder = system.pipeline.text_encoder
    reader = None
    if system.recipe.spec.labels is None and getattr(system.recipe, "text", "own") == "own":
        if encoder.kind != "t5":
            raise KitError(f"prompts are read there by T5, and the encoder here is {encoder.kind!r}")
        reader = pipelines.Reader(encoder.tokenizer, t5(encoder), Prompts(system, prompts))
    elif prompts != "same":
        raise KitError("it is given the embeddings of one call's prompts; prompts: same, or text: own")
    return (*twins(system), reader)


class Asking(System):
    """A system that is asked in sentences, where it reads text."""

    @property
    def prompts(self) -> list[str]:
        """Those of calls that have no other ones."""
        return self.asked(0, range(self.settings.batch))

    def asked(self, call: int, pictures: Sequence[int]) -> list[str]:
        """The prompts of a call, one for each of the numbers."""
        if self.labels:
            return [str((207 + call + i) % 1000) for i in pictures]
        return [f"a large red star above a small blue ring, take {call}.{i}" for i in pictures]


class Prompts:
    """() → the prompts of the next call, one a picture: the n-th call's are the same of everyone.

    Args:
        system: who draws.
        way: one of ``PROMPTS``.
    """

    def __init__(self, system: Asking, way: str):
        self._system, self._way, self._calls = system, way, 0

    def __call__(self) -> list[str]:
        self._calls += 1
        batch = self._system.settings.batch
        call = 0 if self._way == "same" else self._calls
        return self._system.asked(call, [0] * batch if self._way == "one" else range(batch))


class Drawn(Work):
    """Pictures by our pipeline; when they are counted, it notes what the networks were shown.

    Args:
        system: ready to draw.
        prompts: one of ``PROMPTS``.
        note: further words.
    """

    def __init__(self, system: Asking, prompts: str, note: str = ""):
        given = Prompts(system, prompts)

        def draw() -> Tensor:
            return system.pipeline(given(), seed=system.seeds).tensor

        def counted() -> Tensor:
            networks = [module for stage in system.pipeline.stages for module in stage.modules]
            with unrecorded(system), _shown(networks) as samples:
                found = draw()
            self.note = f"{self._words}, {sum(samples)} samples through networks"
            return found

        self._words = words(system.pipeline.stages[0]) + note
        super().__init__(
            draw,
            "pictures",
            system.settings.batch,
            modules=held(system),
            note=self._words,
            eager=counted,
            steps=system.steps,
            passes=system.evaluations,
        )


@contextlib.contextmanager
def _shown(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """A block of code; the samples of every call of the networks within it."""
    samples: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda _, given: samples.append(len(given[0]))) for m in networks]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


def held(system: System) -> list[nn.Module]:
    """Networks, decoders and text encoders whose weights are on the device all the time."""
    encoders = [encoder for encoder in system.pipeline.text_encoders if isinstance(encoder, nn.Module)]
    every = [*system.modules, *encoders]
    if not system.offloaded:
        return every
    return [module for module in every if all(p.device == system.device for p in module.parameters())]

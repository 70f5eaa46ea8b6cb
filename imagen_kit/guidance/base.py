"""What every guidance strategy is: one transform of the guided prediction, and what it needs for that.

Axes: b c h w pictures.

A stack of strategies starts from the conditional prediction. Each strategy in turn is handed the prediction
as guided so far and the named predictions of this call, all in the space it works in, and returns the new
one. Differences add up: two strategies of the form ``guided + w·(a − b)`` compose as published (CFG with PAG,
CFG with autoguidance), in either order.

A new strategy is one file: a frozen dataclass with ``needs``, ``space`` and ``apply``. It may ask for other
conditionings (perpendicular negative prompts) and other networks (autoguidance, perturbed attention) through
its branches, change with the step (scale schedules) through ``active`` and the ``Step`` it is handed, change
the conditioning itself (``condition``), and keep something during one run (``begin``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.step import AXES, Step
from imagen_kit.prediction import PREDICTIONS

Network = Callable[..., Tensor]
Conditioning = Cond | Tensor
Generators = torch.Generator | Sequence[torch.Generator]
SPACES = ("raw", *PREDICTIONS)
TEXT = "text:"
"""Prefix of conditionings that a pipeline makes from the rest of their name: ``text:watercolour``."""


@dataclass(frozen=True)
class Branch:
    """One evaluation of a network that a strategy reads.

    Attributes:
        name: key under which the strategy finds the prediction. Equal branches of several strategies are one.
        cond: the conditioning it is given: ``cond``, ``uncond``, or another name passed to ``denoise_fn``. In
            a pipeline also ``null``, no text, where ``uncond`` may hold a negative prompt.
        through: maps the network to the one to evaluate, e.g. to itself with perturbed attention; None = as
            it is. Branches with the same ``through`` are one batched call; so are those whose ``through``
            has a method ``rows(network, part of the batch)``, which changes the network for its rows only.
        network: name of another network passed to ``denoise_fn``, e.g. a weak one (autoguidance); None = the
            main one. Every network is called by itself.
        is_gradient: what comes back is no prediction but the gradient of a log-probability by x, which is the
            same in every space.
    """

    name: str
    cond: str
    through: Callable[[Network], Network] | None = None
    network: str | None = None
    is_gradient: bool = False


COND = Branch("cond", cond="cond")
UNCOND = Branch("uncond", cond="uncond")


class Guidance:
    """A strategy. Immutable; whatever it must remember it keeps in the object that ``begin`` returns.

    Attributes:
        space: where ``apply`` works: ``raw`` (the network's own output), or a prediction such as x0, eps, v.
        needs: branches read besides ``cond``, which is always there.
        neutral: the scale at which the strategy does nothing.
        of_prompt: whether its scale is the strength of the prompt, which a plain number stands for.
        renoise: the branch from whose x0 the sampler must put the noise back, None for the guided one.
    """

    space: str = "raw"
    neutral: float = 1.0
    of_prompt: bool = False
    renoise: str | None = None

    @property
    def needs(self) -> tuple[Branch, ...]:
        """Branches that ``apply`` may read besides ``cond``."""
        return ()

    def reads(self, step: Step) -> tuple[Branch, ...]:
        """Those of ``needs`` that are read at this step."""
        return self.needs

    def active(self, step: Step) -> bool | Tensor:
        """Whether the strategy acts at this step; where it does not, what it needs is not evaluated.

        A tensor (b or 1, 1, 1, 1) decides sample by sample, and then everything is evaluated: reading it back
        to save evaluations would stall the device.
        """
        return True

    def condition(self, cond: Conditioning | None, step: Step) -> Conditioning | None:
        """The conditioning named ``cond`` as the network is given it at this step; None where there is none."""
        return cond

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        """The new guided prediction.

        Args:
            guided: (b, c, h, w) as the strategies before left it; the very tensor ``predictions["cond"]``
                when none acted.
            predictions: ``cond`` and what the active strategies need, (b, c, h, w) each.
            step: the time and its coefficients.
        """
        return guided

    def begin(self, generator: Generators | None = None) -> Guidance:
        """The strategy for one sampling run: itself where it keeps nothing between evaluations.

        Args:
            generator: source of what it draws; a list holds one a sample.
        """
        return self

    def fit(self, network: Network) -> None:
        """KitError where the strategy cannot work on the main network, such as layers that it lacks."""

    def with_scale(self, scale: float) -> Guidance | None:
        """The same strategy at another guidance scale; None when it has none."""
        return None


class Wrapper(Guidance):
    """A strategy made of another one, its field ``of``: everything is asked of that one."""

    of: Any

    @property
    def inner(self) -> Guidance:
        """The strategy inside."""
        return build(self.of)

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.inner.space

    @property
    def neutral(self) -> float:  # type: ignore[override]
        return self.inner.neutral

    @property
    def of_prompt(self) -> bool:  # type: ignore[override]
        return self.inner.of_prompt

    @property
    def renoise(self) -> str | None:  # type: ignore[override]
        return self.inner.renoise

    @property
    def needs(self) -> tuple[Branch, ...]:
        return self.inner.needs

    def reads(self, step: Step) -> tuple[Branch, ...]:
        return self.inner.reads(step)

    def active(self, step: Step) -> bool | Tensor:
        return self.inner.active(step)

    def condition(self, cond: Conditioning | None, step: Step) -> Conditioning | None:
        return self.inner.condition(cond, step)

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        return self.inner.apply(guided, predictions, step)

    def begin(self, generator: Generators | None = None) -> Guidance:
        return replace(self, of=self.inner.begin(generator))  # type: ignore[type-var]

    def fit(self, network: Network) -> None:
        self.inner.fit(network)

    def with_scale(self, scale: float) -> Guidance | None:
        inner = self.inner.with_scale(scale)
        return None if inner is None else replace(self, of=inner)  # type: ignore[type-var]


def build(spec: Guidance | Mapping[str, Any] | float) -> Guidance:
    """A strategy from itself, from ``{"name": ..., **options}``, or from a number: CFG at that scale.

    Raises:
        KitError: anything else.
    """
    from imagen_kit.guidance import create

    if isinstance(spec, Guidance):
        return spec
    if isinstance(spec, Mapping) and "name" in spec:
        return create(spec["name"], **{key: value for key, value in spec.items() if key != "name"})
    if isinstance(spec, Mapping | str | type) or callable(spec):
        raise KitError(f"guidance must be a strategy, a number or a list of strategies, got {spec!r}")
    return create("cfg", scale=spec)


def stack(spec: Any) -> tuple[Guidance, ...]:
    """A strategy, a number, or an iterable of them, as a tuple; None is the empty stack."""
    if spec is None:
        return ()
    if isinstance(spec, Iterable) and not isinstance(spec, Mapping | str):
        return tuple(build(part) for part in spec)
    return (build(spec),)


def rescaled_stack(strategies: tuple[Guidance, ...], scale: float) -> tuple[Guidance, ...]:
    """The stack with the prompt at another guidance scale; CFG is put first where no strategy has one.

    Scales that are not the prompt's (of perturbed attention, of a weak network) stay as they are.
    """
    changed = [strategy.with_scale(scale) if strategy.of_prompt else None for strategy in strategies]
    if not any(changed):
        return (build(scale), *strategies)
    return tuple(new or old for new, old in zip(changed, strategies, strict=True))


def acting(strategies: Sequence[Guidance], step: Step) -> list[tuple[Guidance, bool | Tensor]]:
    """The strategies that act at a step, each with where it does: True, or a tensor (b or 1, 1, 1, 1)."""
    found = [(strategy, strategy.active(step)) for strategy in strategies]
    return [(strategy, when) for strategy, when in found if isinstance(when, Tensor) or when]


def branches(strategies: Sequence[Guidance], step: Step) -> list[Branch]:
    """What is evaluated at a step, ``cond`` first, each once: its length is the step's cost in evaluations."""
    return read(acting(strategies, step), step)


def read(active: Sequence[tuple[Guidance, bool | Tensor]], step: Step) -> list[Branch]:
    """``branches`` of strategies that were found to act."""
    return list(dict.fromkeys([COND, *(branch for strategy, _ in active for branch in strategy.reads(step))]))


def require(strategy: Guidance, conds: Collection[str], networks: Collection[str]) -> None:
    """KitError unless the conditionings and networks that the strategy needs are among those named."""
    who = f"guidance {type(strategy).__name__}"
    for branch in strategy.needs:
        if branch.cond not in conds and branch.cond != COND.cond:
            given = ", ".join(conds) or "none"
            raise KitError(f"{who} needs the conditioning {branch.cond!r}; given: {given}")
        if branch.network is not None and branch.network not in networks:
            given = ", ".join(networks) or "none"
            raise KitError(f"{who} needs the network {branch.network!r}; given: {given}")


def renoised(sampler: Any, strategies: Sequence[Guidance]) -> Any:
    """The sampler, putting the noise back as the guidance defines it (``Guidance.renoise``).

    Raises:
        KitError: a sampler without that option, with those that have it.
    """
    from imagen_kit import samplers

    wanted = next((strategy.renoise for strategy in strategies if strategy.renoise), None)
    if wanted is None:
        return sampler
    if not hasattr(sampler, "renoise"):
        able = [name for name in samplers.names() if "renoise" in samplers.describe(name)["options"]]
        name = getattr(sampler, "name", type(sampler).__name__)
        raise KitError(
            f"guidance cfg_pp needs a sampler with the option renoise, which {name!r} has not; "
            f"choose from {', '.join(able)}"
        )
    return replace(sampler, renoise=wanted)


def inside(step: Step, low: float, high: float, axis: str) -> bool | Tensor:
    """low < position ≤ high, as Kynkäänniemi et al. 2024 write their interval."""
    position = step.on(axis)
    if isinstance(position, Tensor):
        return (position > low) & (position <= high)
    return low < position <= high


def number(value: object, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high], or KitError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise KitError(f"{what} must be a number, got {value!r}")
    if not low <= float(value) <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise KitError(f"{what} must be {bounds}, got {value!r}")
    return float(value)


def check_space(space: object) -> None:
    """KitError unless it is one of ``SPACES``."""
    if space not in SPACES:
        raise KitError(unknown("guidance space", space, SPACES))


def check_interval(interval: Any, axis: object = "sigma") -> None:
    """KitError unless it is (low, high), numbers with low < high (infinite ones allowed), on a known axis."""
    if axis not in AXES:
        raise KitError(unknown("guidance interval axis", axis, AXES))
    numbers = isinstance(interval, Sequence) and all(
        isinstance(bound, Real) and not isinstance(bound, bool) and not math.isnan(bound)
        for bound in interval
    )
    if not numbers or len(interval) != 2:
        raise KitError(f"a guidance interval is two numbers (low, high), got {interval!r}")
    low, high = interval
    if not low < high:
        raise KitError(f"a guidance interval needs low < high, got ({low}, {high})")

"""What every guidance strategy is: one transform of the guided prediction, and what it needs for that.

Axes: b c h w pictures.

A stack of strategies starts from the conditional prediction. Each strategy in turn is handed the prediction
as guided so far and the named predictions of this call, all in the space it works in, and returns the new
one. Differences add up: two strategies of the form ``guided + w·(a − b)`` compose as published (CFG with PAG,
CFG with autoguidance), in either order.

A new strategy is one file: a frozen dataclass with ``needs``, ``space`` and ``apply``. It may ask for other
conditionings (perpendicular negative prompts) and other networks (autoguidance, perturbed attention) through
its branches, and change with the step (scale schedules) through ``active`` and the ``Step`` it is handed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.prediction import PREDICTIONS

Network = Callable[..., Tensor]
SPACES = ("raw", *PREDICTIONS)
AXES = ("sigma", "log_snr", "t")


@dataclass(frozen=True)
class Branch:
    """One evaluation of a network that a strategy reads.

    Attributes:
        name: key under which the strategy finds the prediction. Equal branches of several strategies are one.
        cond: the conditioning it is given: ``cond``, ``uncond``, or another name passed to ``denoise_fn``.
        through: maps the main network to the one to evaluate, e.g. to a weak one (autoguidance) or to itself
            with perturbed attention; None = the main network. Branches with the same ``through`` are one
            batched call.
    """

    name: str
    cond: str
    through: Callable[[Network], Network] | None = None


COND = Branch("cond", cond="cond")
UNCOND = Branch("uncond", cond="uncond")


@dataclass(frozen=True)
class Step:
    """Where in the diffusion a call takes place.

    Attributes:
        t, alpha, sigma: floats; or tensors (b or 1, 1, 1, 1), the latter two in float64, when the caller
            passed a tensor t.
    """

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor

    @property
    def coefficients(self) -> tuple[Any, Any, Any]:
        """t, alpha, sigma: all floats or all tensors, which no annotation can say."""
        return self.t, self.alpha, self.sigma

    def on(self, axis: str) -> float | Tensor:
        """The position on one of ``AXES``; sigma is the noise-to-signal ratio sigma/alpha, as in EDM."""
        if axis == "t":
            return self.t
        alpha, sigma = self.alpha, self.sigma
        if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
            ratio = torch.as_tensor(sigma / alpha)
            return ratio if axis == "sigma" else -2 * ratio.log()
        ratio_ = sigma / alpha if alpha else math.inf
        if axis == "sigma":
            return ratio_
        return -2 * math.log(ratio_) if ratio_ else math.inf


class Guidance:
    """A strategy. Immutable, without state between calls.

    Attributes:
        space: where ``apply`` works: ``raw`` (the network's own output), or a prediction such as x0, eps, v.
        needs: branches read besides ``cond``, which is always there.
    """

    space: str = "raw"

    @property
    def needs(self) -> tuple[Branch, ...]:
        """Branches that ``apply`` may read besides ``cond``."""
        return ()

    def active(self, step: Step) -> bool | Tensor:
        """Whether the strategy acts at this step; where it does not, what it needs is not evaluated.

        A tensor (b or 1, 1, 1, 1) decides sample by sample, and then everything is evaluated: reading it back
        to save evaluations would stall the device.
        """
        return True

    def apply(self, guided: Tensor, predictions: Mapping[str, Tensor], step: Step) -> Tensor:
        """The new guided prediction.

        Args:
            guided: (b, c, h, w) as the strategies before left it; the very tensor ``predictions["cond"]``
                when none acted.
            predictions: ``cond`` and what the active strategies need, (b, c, h, w) each.
            step: the time and its coefficients.
        """
        raise NotImplementedError

    def with_scale(self, scale: float) -> Guidance | None:
        """The same strategy at another guidance scale; None when it has none."""
        return None


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
    """The stack at another guidance scale; CFG is put first where no strategy has a scale."""
    changed = [strategy.with_scale(scale) for strategy in strategies]
    if not any(changed):
        return (build(scale), *strategies)
    return tuple(new or old for new, old in zip(changed, strategies, strict=True))


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

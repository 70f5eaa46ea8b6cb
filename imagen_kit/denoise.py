"""Any network becomes the one function that samplers see: ``denoise(x, t) -> x0``.

Axes: b batch, c h w pictures, m branches (cond, uncond, ...) evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_kit import prediction as predictions
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.base import COND, Branch, Guidance, Network, Step, stack

Conditioning = Cond | Tensor


def denoise_fn(
    network: Network,
    schedule: Any,
    prediction: str = "eps",
    *,
    cond: Conditioning | None = None,
    uncond: Conditioning | None = None,
    guidance: Guidance | Sequence[Guidance] | float = (),
    others: Mapping[str, Conditioning] | None = None,
    sigma_data: float = 0.5,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
) -> Denoise:
    """Wrap a network for the samplers.

    Args:
        network: ``network(x, t)``, or ``network(x, t, cond)`` when ``cond`` is given; x (b, c, h, w), t (b,)
            float32 on x's device, holding what ``prediction.network_input`` says (the native time, except for
            ``edm``). Returns (b, c, h, w), or (b, 2c, h, w) with a learned variance, which is left out.
        schedule: its noise schedule.
        prediction: what it was trained to say: eps, x0, v, flow or edm.
        cond: conditioning of the batch: a ``Cond``, or any tensor (b, ...).
        uncond: the same for the unconditional (or negative) branch.
        guidance: a strategy, several in the order they act, or a number (CFG at that scale).
        others: further conditionings by name, for strategies that ask for them.
        sigma_data: spread of the data, for ``edm``.
        clip: bound of |x0|; None leaves it free.
        dtype: dtype the network is fed with; None = that of x.

    Returns:
        ``denoise(x, t)``: (b, c, h, w) prediction of x0 in x's dtype; t is a float, or a tensor () or (b,).

    Raises:
        KitError: unknown prediction; guidance needs a conditioning that was not given; clip not above 0.
    """
    conds = {"cond": cond, "uncond": uncond, **(others or {})}
    return Denoise(
        network,
        schedule,
        prediction,
        {name: value for name, value in conds.items() if value is not None},
        stack(guidance),
        sigma_data,
        clip,
        dtype,
    )


class Denoise:
    """See ``denoise_fn``. Holds no state that a call changes, apart from conditionings already joined.

    All coefficients are float64 numbers of the host: a call reads nothing back from the device.
    """

    def __init__(
        self,
        network: Network,
        schedule: Any,
        prediction: str,
        conds: dict[str, Conditioning],
        guidance: tuple[Guidance, ...],
        sigma_data: float,
        clip: float | None,
        dtype: torch.dtype | None,
    ):
        if prediction not in predictions.PREDICTIONS:
            raise KitError(unknown("prediction", prediction, predictions.PREDICTIONS))
        if clip is not None and not clip > 0:
            raise KitError(f"clip must be above 0, got {clip!r}")
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.guidance, self.sigma_data, self.clip, self.dtype = guidance, sigma_data, clip, dtype
        self.conds = conds
        self._joined: dict[tuple[str, ...], Conditioning] = {}
        if conds and "cond" not in conds:
            raise KitError(f"the conditioning {', '.join(conds)} was given without 'cond'")
        known = {COND.name: COND}
        for strategy, branch in ((s, branch) for s in guidance for branch in s.needs):
            who = f"guidance {type(strategy).__name__}"
            if branch.cond not in conds and branch.cond != COND.cond:
                given = ", ".join(conds) or "none"
                raise KitError(f"{who} needs the conditioning {branch.cond!r}; given: {given}")
            if known.setdefault(branch.name, branch) != branch:
                raise KitError(f"{who} means another prediction by {branch.name!r} than a strategy before it")

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x0 predicted from x (b, c, h, w) at native time t: a float, or a tensor () or (b,)."""
        step = self._step(x, t)
        acting = [(s, when) for s in self.guidance if isinstance(when := s.active(step), Tensor) or when]
        branches = list(dict.fromkeys([COND, *(branch for s, _ in acting for branch in s.needs)]))
        work = torch.promote_types(x.dtype, torch.float32)
        outputs = {name: raw.to(work) for name, raw in self._evaluate(x, step, branches)}
        views = _Views(outputs, x.to(work), self, step)
        guided, space, touched = outputs["cond"], self.prediction, False
        for strategy, when in acting:
            target = self.prediction if strategy.space == "raw" else strategy.space
            view = views[target]
            before = views.change(guided, space, target) if touched else view["cond"]
            after = strategy.apply(before, view, step)
            guided = torch.where(when, after, before) if isinstance(when, Tensor) else after
            space, touched = target, True
        x0 = views.change(guided, space, "x0")
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return x0.to(x.dtype)

    def _step(self, x: Tensor, t: float | Tensor) -> Step:
        if isinstance(t, Tensor):
            if t.shape not in ((), x.shape[:1]):
                raise KitError(f"t has shape {tuple(t.shape)}; give one time, or one per sample: {len(x)}")
            t = t.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
        return Step(t, *self.schedule.alpha_sigma(t))

    def _evaluate(self, x: Tensor, step: Step, branches: list[Branch]) -> Iterator[tuple[str, Tensor]]:
        """Raw outputs by branch name; branches through the same network are one call on a batch of m·b."""
        t, alpha, sigma = step.coefficients
        scaled, told = predictions.network_input(self.prediction, x, t, alpha, sigma, self.sigma_data)
        scaled = scaled.to(self.dtype or x.dtype)
        groups: dict[Callable[[Network], Network] | None, list[Branch]] = {}
        for branch in branches:
            groups.setdefault(branch.through, []).append(branch)
        for through, group in groups.items():
            network = self.network if through is None else through(self.network)
            m = len(group)
            inputs = scaled.repeat(m, *(1,) * (x.ndim - 1)) if m > 1 else scaled
            time = _per_sample(told, len(x), x.device)
            arguments: list[Any] = [inputs, time.repeat(m) if m > 1 else time]
            if self.conds:
                arguments.append(self._cond(tuple(branch.cond for branch in group), len(x)))
            output = network(*arguments)
            yield from zip((b.name for b in group), self._means(output, x, m), strict=True)

    def _cond(self, names: tuple[str, ...], batch: int) -> Conditioning:
        if names not in self._joined:
            parts = [self.conds[name] for name in names]
            for name, part in zip(names, parts, strict=True):
                size = part.batch if isinstance(part, Cond) else len(part)
                if size not in (None, batch):
                    raise KitError(f"conditioning {name!r} is for {size} samples, but x holds {batch}")
            self._joined[names] = parts[0] if len(parts) == 1 else _cat(names, parts)
        return self._joined[names]

    def _means(self, output: Tensor, x: Tensor, m: int) -> tuple[Tensor, ...]:
        b, c, *rest = x.shape
        if list(output.shape) not in ([m * b, c, *rest], [m * b, 2 * c, *rest]):
            raise KitError(
                f"the network answered {tuple(output.shape)} to an input of {(m * b, c, *rest)}; "
                f"it must keep the shape, or double the {c} channels (learned variance)"
            )
        return output[:, :c].chunk(m)

    def between(self, step: Step, source: str, target: str) -> tuple[float | Tensor, float | Tensor]:
        """(p, q) with prediction ``target`` = p·x + q·(prediction ``source``), composed in float64.

        Going straight from one to the other keeps float32 pictures clear of the cancellation that a detour
        through x0 has where alpha is small.
        """
        _, alpha, sigma = step.coefficients
        a, b = predictions.coefficients(source, alpha, sigma, self.sigma_data)
        if target == "x0":
            return a, b
        a_, b_ = predictions.coefficients(target, alpha, sigma, self.sigma_data)
        if not isinstance(b_, Tensor) and b_ == 0:
            raise KitError(
                f"guidance in the space {target!r} is undefined at t={step.t} (sigma={step.sigma})"
            )
        return (a - a_) / b_, b / b_


class _Views:
    """The predictions of one call in every space, converted when asked for."""

    def __init__(self, raw: dict[str, Tensor], x: Tensor, owner: Denoise, step: Step):
        self._views = {owner.prediction: raw}
        self._raw, self._x, self._owner, self._step = raw, x, owner, step

    def __getitem__(self, space: str) -> dict[str, Tensor]:
        if space not in self._views:
            source = self._owner.prediction
            self._views[space] = {k: self.change(v, source, space) for k, v in self._raw.items()}
        return self._views[space]

    def change(self, value: Tensor, source: str, target: str) -> Tensor:
        """``value`` taken from one space to another."""
        if source == target:
            return value
        p, q = (
            c.to(value.device, value.dtype) if isinstance(c, Tensor) else c
            for c in self._owner.between(self._step, source, target)
        )
        return p * self._x + q * value


def _per_sample(told: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """(b,) float32 on the device; a float is filled in by a kernel, not copied from the host."""
    if isinstance(told, Tensor):
        return told.to(device, torch.float32).reshape(-1).expand(batch)
    return torch.full((batch,), told, dtype=torch.float32, device=device)


def _cat(names: Sequence[str], parts: list[Conditioning]) -> Conditioning:
    """Conditionings of the branches, one after another along the batch."""
    try:
        if isinstance(parts[0], Cond):
            return Cond.cat(parts)  # type: ignore[arg-type]
        return torch.cat(parts)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise KitError(f"the conditionings {', '.join(names)} do not fit together: {error}") from error

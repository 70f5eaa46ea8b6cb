"""Any network becomes the one function that samplers see: ``denoise(x, t) -> x0``.

Axes: b batch, c h w pictures, m branches (cond, uncond, ...) evaluated together.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_kit import prediction as predictions
from imagen_kit.caches import base as caches
from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError, unknown
from imagen_kit.guidance.base import (
    COND,
    Branch,
    Conditioning,
    Generators,
    Guidance,
    Network,
    require,
    stack,
)
from imagen_kit.guidance.step import Step, Times
from imagen_kit.guided import Call

EXECUTIONS = ("batched", "split")


def denoise_fn(
    network: Network,
    schedule: Any,
    prediction: str = "eps",
    *,
    cond: Conditioning | None = None,
    uncond: Conditioning | None = None,
    guidance: Guidance | Sequence[Guidance] | float = (),
    others: Mapping[str, Conditioning] | None = None,
    networks: Mapping[str, Network] | None = None,
    execution: str = "batched",
    sigma_data: float = 0.5,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    cache: caches.StepCache | Mapping[str, Any] | str | None = None,
    remember_text: bool = True,
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
        networks: further networks by name, for strategies that ask for them (autoguidance); each is called
            like ``network`` and says the same prediction.
        execution: ``batched``: all that a network must answer at a time is one call of m·b samples;
            ``split``: a call for each branch, which needs less memory. The result is the same.
        sigma_data: spread of the data, for ``edm``.
        clip: bound of |x0|; None leaves it free.
        dtype: dtype the network is fed with; None = that of x.
        cache: a step cache, or what ``caches.create`` is given: ``{"name": "first_block", "threshold": 0.1}``. It
            acts in runs (``begin``); a call outside one computes all. Each branch has a memory of its own.
        remember_text: call the network's ``prepare``, where it has one, once in a run for each joined
            conditioning, so that what it makes of that alone is not made at every step. The answers are the
            same; not while gradients are recorded, nor for a conditioning that guidance changes.

    Returns:
        ``denoise(x, t)``: (b, c, h, w) prediction of x0 in x's dtype; t is a float, or a tensor () or (b,).

    Raises:
        KitError: unknown prediction or execution; guidance needs a conditioning or a network that was not
            given, or layers that the network lacks; clip not above 0; a cache that the networks have no place for.
    """
    if execution not in EXECUTIONS:
        raise KitError(unknown("guidance execution", execution, EXECUTIONS))
    conds = {"cond": cond, "uncond": uncond, **(others or {})}
    return Denoise(
        network,
        schedule,
        prediction,
        {name: value for name, value in conds.items() if value is not None},
        stack(guidance),
        dict(networks or {}),
        execution == "split",
        sigma_data,
        clip,
        dtype,
        caches.build(cache),
        remember_text,
    )


class Denoise:
    """See ``denoise_fn``. Holds no state that a call changes, apart from conditionings already joined.

    What guidance keeps during a run (momentum, noise) is in the object that ``begin`` makes for that run.
    All coefficients are float64 numbers of the host: a call reads nothing back from the device.
    """

    def __init__(
        self,
        network: Network,
        schedule: Any,
        prediction: str,
        conds: dict[str, Conditioning],
        guidance: tuple[Guidance, ...],
        networks: dict[str, Network],
        split: bool,
        sigma_data: float,
        clip: float | None,
        dtype: torch.dtype | None,
        cache: caches.StepCache | None = None,
        remember_text: bool = True,
    ):
        if prediction not in predictions.PREDICTIONS:
            raise KitError(unknown("prediction", prediction, predictions.PREDICTIONS))
        if clip is not None and not clip > 0:
            raise KitError(f"clip must be above 0, got {clip!r}")
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.guidance, self.sigma_data, self.clip, self.dtype = guidance, sigma_data, clip, dtype
        self.conds, self.networks, self.split = conds, networks, split
        self.times: Times | None = None
        self.remember_text, self._running = remember_text, False
        self._joined: dict[Any, Conditioning] = {}
        self._levels = functools.partial(_levels, schedule) if _hashable(schedule) else schedule.alpha_sigma
        if conds and "cond" not in conds:
            raise KitError(f"the conditioning {', '.join(conds)} was given without 'cond'")
        self.branches = {COND.name: COND}
        for strategy in guidance:
            self._admit(strategy)
        self.cache = cache
        self.cached: caches.Run | None = None
        if cache is not None:
            read = {branch.network for branch in self.branches.values() if not branch.is_gradient}
            for name in read:
                cache.fit(network if name is None else networks[name])

    def _admit(self, strategy: Guidance) -> None:
        """KitError where what the strategy needs is missing."""
        require(strategy, self.conds, self.networks)
        for branch in strategy.needs:
            if self.branches.setdefault(branch.name, branch) != branch:
                raise KitError(
                    f"guidance {type(strategy).__name__} means another prediction by {branch.name!r} "
                    "than a strategy before it"
                )
            if branch.is_gradient and self.prediction == "edm":
                raise KitError(f"guidance {type(strategy).__name__} is of networks fed x itself, not of edm")
        strategy.fit(self.network)

    def begin(
        self,
        times: Sequence[float] | Tensor | None = None,
        generator: Generators | None = None,
        parts: Sequence[str] = (),
    ) -> Denoise:
        """The same function for one sampling run, with a memory of its own; samplers call it.

        Runs share nothing: two of them may be interleaved, and ``self`` stays as it was.

        Args:
            times: the run's grid of native times, noisiest first: n numbers, or (b, n).
            generator: source of the noise that guidance draws (cads); a list holds one a sample, so that a
                sample does not depend on its batch.
            parts: the names that the sampler will ask ``parts`` for.

        Raises:
            KitError: guidance that is defined by where the noise comes from (cfg_pp), and a sampler that does
                not take it from there.
        """
        for strategy in self.guidance:
            if strategy.renoise is not None and strategy.renoise not in parts:
                raise KitError(
                    f"guidance {type(strategy).__name__} puts the noise back from {strategy.renoise!r}: "
                    f"give it a sampler with the option renoise={strategy.renoise!r}, such as ddim"
                )
        run = copy.copy(self)
        run.guidance = tuple(strategy.begin(generator) for strategy in self.guidance)
        run.times = times if times is None or isinstance(times, Tensor) else tuple(times)
        run._joined, run._running = {}, True
        run.cached = None if self.cache is None else self.cache.begin(self.network, times)
        return run

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x0 predicted from x (b, c, h, w) at native time t: a float, or a tensor () or (b,)."""
        return Call(self, x, t).x0

    def parts(self, x: Tensor, t: float | Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """The guided x0 and, for every name, the unguided x0 of that branch, (b, c, h, w) each in x's dtype.

        Where no acting strategy reads a branch there is no guidance by it, and its part is the guided x0: it
        costs no evaluation, and a sampler that uses it is the usual one. ``clip`` bounds the guided x0 only.

        Raises:
            KitError: a branch that no strategy reads at any time.
        """
        for name in names:
            if name not in self.branches:
                known = ", ".join(self.branches)
                raise KitError(
                    f"no guidance reads {name!r} (there is {known}); a sampler with renoise={name!r} needs a "
                    "guided denoiser (guidance cfg or cfg_pp at a scale other than 1)"
                )
        call = Call(self, x, t)
        return (call.x0, *(call.part(name) for name in names))

    def with_variance(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The guided x0 and the learned-range value v of the conditional branch, (b, c, h, w) each.

        v in [-1, 1] is what the network says in the second half of its channels: the logarithm of the
        variance is frac·log β + (1 − frac)·log β̃ with frac = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15).

        Raises:
            KitError: a network that says no variance.
        """
        call = Call(self, x, t)
        if call.variance is None:
            raise KitError(
                f"the network has no learned variance: it answers {x.shape[1]} channels, not {2 * x.shape[1]}"
            )
        return call.x0, call.variance

    def step(self, x: Tensor, t: float | Tensor) -> Step:
        """Where in the run (x, t) is; KitError for a tensor t of another batch."""
        if isinstance(t, Tensor):
            if t.shape not in ((), x.shape[:1]):
                raise KitError(f"t has shape {tuple(t.shape)}; give one time, or one per sample: {len(x)}")
            t = t.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
            alpha, sigma = self.schedule.alpha_sigma(t)
        else:
            alpha, sigma = self._levels(t)
        return Step(t, alpha, sigma, self.times)

    def evaluate(
        self, x: Tensor, step: Step, wanted: list[Branch], cond: Conditioning | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Raw outputs (b, c or 2c, h, w) by branch name.

        Args:
            cond: what the network is given as ``cond`` at this step.
        """
        t, alpha, sigma = step.coefficients
        scaled, told = predictions.network_input(self.prediction, x, t, alpha, sigma, self.sigma_data)
        scaled = scaled.to(self.dtype or x.dtype)
        if self.cached is not None:
            self.cached.turn(t)
        for network, group in self._calls(wanted, len(x)):
            m = len(group)
            inputs = torch.cat([scaled] * m) if m > 1 else scaled
            arguments: list[Any] = [inputs, _per_sample(told, m, x)]
            if self.conds:
                arguments.append(self._cond(group, len(x), cond))
            if self.cached is not None and not group[0].is_gradient:
                network = self.cached.through(network, [branch.name for branch in group])
            output = network(*arguments)
            self._check(output, x, m)
            yield from zip((branch.name for branch in group), output.chunk(m), strict=True)

    def _calls(self, wanted: list[Branch], batch: int) -> Iterator[tuple[Network, list[Branch]]]:
        """Every network to call, and the branches that it answers, one after another along its batch."""
        groups: dict[Any, list[Branch]] = {}
        for branch in wanted:
            # a cache may leave rows out of a layer's batch, so with one a change is of a call's whole batch
            by_rows = branch.through is None or (self.cached is None and hasattr(branch.through, "rows"))
            key = (branch.network, None if by_rows else branch.through, branch.name if self.split else None)
            groups.setdefault(key, []).append(branch)
        for (name, through, _), group in groups.items():
            network = self.network if name is None else self.networks[name]
            if through is not None:
                network = through(network)
            elif len(group) == 1 and group[0].through is not None:
                network = group[0].through(network)
            else:
                for i, branch in enumerate(group):
                    if branch.through is not None:
                        network = branch.through.rows(network, slice(i * batch, (i + 1) * batch))  # type: ignore[attr-defined]
            yield network, group

    def _cond(self, group: list[Branch], batch: int, cond: Conditioning | None) -> Conditioning:
        """What the network of these branches is given; joined once, and prepared once in a run."""
        names, network = tuple(branch.cond for branch in group), group[0].network
        if cond is not self.conds["cond"] and "cond" in names:  # another one at every step
            assert cond is not None
            return self._join(names, {**self.conds, "cond": cond}, batch)
        # outside a run weights may change from call to call, and a graph of gradients is freed after each
        remember = self._running and self.remember_text and not torch.is_grad_enabled()
        key = (names, network, remember)
        if key not in self._joined:
            joined = self._join(names, self.conds, batch)
            owner = self.network if network is None else self.networks[network]
            prepare = getattr(owner, "prepare", None) if remember and isinstance(joined, Cond) else None
            self._joined[key] = joined if prepare is None else prepare(joined)
        return self._joined[key]

    def _join(self, names: tuple[str, ...], conds: Mapping[str, Conditioning], batch: int) -> Conditioning:
        parts = [conds[name] for name in names]
        for name, part in zip(names, parts, strict=True):
            size = part.batch if isinstance(part, Cond) else len(part)
            if size not in (None, batch):
                raise KitError(f"conditioning {name!r} is for {size} samples, but x holds {batch}")
        return parts[0] if len(parts) == 1 else _cat(names, parts)

    @staticmethod
    def _check(output: Tensor, x: Tensor, m: int) -> None:
        b, c, *rest = x.shape
        if list(output.shape) not in ([m * b, c, *rest], [m * b, 2 * c, *rest]):
            raise KitError(
                f"the network answered {tuple(output.shape)} to an input of {(m * b, c, *rest)}; "
                f"it must keep the shape, or double the {c} channels (learned variance)"
            )

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


def _cat(names: Sequence[str], parts: list[Conditioning]) -> Conditioning:
    """Conditionings of the branches, one after another along the batch."""
    try:
        if isinstance(parts[0], Cond):
            return Cond.cat(parts)  # type: ignore[arg-type]
        return torch.cat(parts)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise KitError(f"the conditionings {', '.join(names)} do not fit together: {error}") from error


def _per_sample(told: float | Tensor, m: int, x: Tensor) -> Tensor:
    """(m·b,) float32 on x's device; a float is filled in by a kernel, not copied from the host."""
    if isinstance(told, Tensor):
        return told.to(x.device, torch.float32).reshape(-1).expand(len(x)).repeat(m)
    return torch.full((m * len(x),), told, dtype=torch.float32, device=x.device)


def _hashable(schedule: Any) -> bool:
    try:
        hash(schedule)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _levels(schedule: Any, t: float) -> tuple[float, float]:
    """Schedules are immutable, and every run on a grid asks for the same times."""
    return schedule.alpha_sigma(t)

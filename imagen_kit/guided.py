"""One call of a guided denoiser: the branches evaluated, their views in every space, and the guided x0.

Axes: b batch, c h w pictures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagen_kit.guidance.base import acting, read
from imagen_kit.guidance.step import Step

if TYPE_CHECKING:
    from imagen_kit.denoise import Denoise


class Call:
    """A call at (x, t).

    Attributes:
        x0: (b, c, h, w) the guided prediction, in x's dtype.
        variance: (b, c, h, w) what the conditional branch says of it; None for a network without.
    """

    def __init__(self, owner: Denoise, x: Tensor, t: float | Tensor):
        self._owner, self._dtype = owner, x.dtype
        self._step = step = owner.step(x, t)
        self._acting = acting(owner.guidance, step)
        cond = owner.conds.get("cond")
        for strategy, when in self._acting:
            cond = strategy.condition(cond, _at(step, when))
        outputs = dict(owner.evaluate(x, step, read(self._acting, step), cond))
        work, c = torch.promote_types(x.dtype, torch.float32), x.shape[1]
        told, self.variance = outputs["cond"], None
        if told.shape[1] == 2 * c:
            self.variance = told[:, c:].to(work)
            outputs = {name: raw[:, :c] for name, raw in outputs.items()}
        self._x = x.to(work)
        self._views = {owner.prediction: {name: raw.to(work) for name, raw in outputs.items()}}
        x0 = self._guide()
        self.x0 = (x0 if owner.clip is None else x0.clamp(-owner.clip, owner.clip)).to(x.dtype)

    def _guide(self) -> Tensor:
        """x0 after all strategies, each in its own space."""
        space, guided, touched = self._owner.prediction, self._view(self._owner.prediction)["cond"], False
        for strategy, when in self._acting:
            target = self._owner.prediction if strategy.space == "raw" else strategy.space
            view = self._view(target)
            before = self._change(guided, space, target) if touched else view["cond"]
            after = strategy.apply(before, view, _at(self._step, when))
            guided = torch.where(when, after, before) if isinstance(when, Tensor) else after
            space, touched = target, True
        return self._change(guided, space, "x0")

    def part(self, name: str) -> Tensor:
        """The unguided x0 of a branch; the guided one where no acting strategy reads it."""
        reading = [
            when for s, when in self._acting if name in (branch.name for branch in s.reads(self._step))
        ]
        if name != "cond" and not reading:
            return self.x0
        own = self._view("x0")[name].to(self._dtype)
        if name == "cond" or any(not isinstance(when, Tensor) for when in reading):
            return own
        somewhere = torch.stack(torch.broadcast_tensors(*reading)).any(0)  # type: ignore[arg-type]
        return torch.where(somewhere, own, self.x0)

    def _view(self, space: str) -> dict[str, Tensor]:
        """All branches in a space, converted when first asked for."""
        if space not in self._views:
            source = self._owner.prediction
            raw = self._views[source]
            known = self._owner.branches
            self._views[space] = {
                name: value if known[name].is_gradient else self._change(value, source, space)
                for name, value in raw.items()
            }
        return self._views[space]

    def _change(self, value: Tensor, source: str, target: str) -> Tensor:
        """``value`` taken from one space to another."""
        if source == target:
            return value
        p, q = self._owner.between(self._step, source, target)
        if isinstance(p, Tensor) or isinstance(q, Tensor):
            p, q = (c.to(value.device, value.dtype) if isinstance(c, Tensor) else c for c in (p, q))
            return p * self._x + q * value
        return torch.add(self._x * p, value, alpha=q)  # two passes over memory instead of three


def _at(step: Step, when: bool | Tensor) -> Step:
    """The step as a strategy sees it that acts there for some samples."""
    return replace(step, where=when) if isinstance(when, Tensor) else step

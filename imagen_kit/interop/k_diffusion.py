"""k-diffusion's convention, both ways: ``model(x, sigma, **extra_args) -> denoised`` with x = x0 + sigma noise.

Axes: b batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError
from imagen_kit.schedules.base import Schedule
from imagen_kit.schedules.edm import Edm

#: ``model(x (b, ...), sigma (b,), **extra_args) -> denoised (b, ...)``.
KModel = Callable[..., Tensor]


class Wrapped:
    """A k-diffusion model as ``denoise(x, t) -> x0`` and as a network of prediction ``x0``; see ``wrap``."""

    def __init__(self, model: KModel, schedule: Schedule, extra_args: dict[str, Any]):
        self.model, self.schedule, self.extra_args = model, schedule, extra_args

    def __call__(self, x: Tensor, t: float | Tensor, cond: Any = None) -> Tensor:
        """x0 for x (b, ...) at native time t: a float, or (b,)."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        if not isinstance(alpha, Tensor) and alpha == 0:
            raise KitError("a k-diffusion model knows no state without signal (alpha = 0); start below it")
        ratio = sigma / alpha
        if isinstance(alpha, Tensor):
            level = ratio.to(x.device, x.dtype)  # type: ignore[union-attr]
            x = x / alpha.to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        else:
            level = torch.full((len(x),), float(ratio), device=x.device, dtype=x.dtype)
            x = x / alpha if alpha != 1.0 else x
        extra = self.extra_args if cond is None else {**self.extra_args, "cond": cond}
        return self.model(x, level, **extra)


def wrap(model: KModel, schedule: Schedule | None = None, **extra_args: Any) -> Wrapped:
    """A k-diffusion model for our samplers.

    The result goes straight into ``sampler.sample`` as ``denoise``, or into ``denoise_fn`` as a network of
    prediction ``x0`` (a ``cond`` given there reaches the model as its argument ``cond``). On a schedule other
    than ``edm`` the state is divided by alpha first, since k-diffusion's carries the whole signal.

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``: k-diffusion's wrappers, or any such function.
        schedule: what the sampler's t means; None = ``edm``, where t is sigma.
        extra_args: passed on with every call.
    """
    return Wrapped(model, schedule or Edm(), extra_args)


def model(denoise: Callable[[Tensor, Tensor], Tensor], schedule: Schedule) -> KModel:
    """Our ``denoise`` as a k-diffusion model, for its samplers or another interface's.

    Args:
        denoise: (x, t (b,)) -> x0, as made by ``denoise_fn``.
        schedule: the schedule it was made with.

    Returns:
        ``model(x, sigma)``: x (b, ...) = x0 + sigma noise, sigma (b,); further keyword arguments are refused.
    """

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.t_of_ratio(sigma.double())
        alpha = schedule.alpha_sigma(t)[0].to(x.device, x.dtype)
        return denoise(x * alpha.reshape(-1, *(1,) * (x.ndim - 1)), t)

    return denoised

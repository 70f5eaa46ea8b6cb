"""The ideal denoisers of ``analytic`` as networks, so that a recipe can name them.

Axes: b batch, c h w pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imagen_kit import schedules
from imagen_kit.conditioning import Cond
from imagen_kit.denoisers import register
from imagen_kit.denoisers.analytic import FiniteData, Gaussian, GaussianMixture, Values, as_numbers, patterns
from imagen_kit.errors import KitError, unknown
from imagen_kit.schedules.base import Schedule

ANSWERS = ("x0", "eps", "v", "flow")


class Analytic(nn.Module):
    """An analytic problem as a network ``(x, t, cond) -> output`` that needs no training.

    ``cond.labels`` names the component; the number of components stands for "no class". Other conditioning
    is not read.

    Args:
        problem: the data.
        schedule: what t means: a schedule or a registered name.
        prediction: what it answers: x0, eps, v or flow.

    Raises:
        KitError: an unknown schedule or prediction, or ``edm``, whose network is not told t.
    """

    def __init__(self, problem: GaussianMixture, schedule: Schedule | str, prediction: str = "x0"):
        super().__init__()
        if prediction not in ("x0", "eps", "v", "flow"):
            raise KitError(
                unknown("prediction of an analytic denoiser", prediction, ("x0", "eps", "v", "flow"))
            )
        self.problem, self.prediction = problem, prediction
        self.schedule = schedules.create(schedule) if isinstance(schedule, str) else schedule
        self.out_channels = problem.shape[0]
        # Holds nothing; tells pipelines the device and dtype they moved this network to.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The ideal answer for x (b, *shape) at native times t (b,), of x's shape and dtype."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        labels = None if cond is None else cond.labels
        x0, eps = (f(wide, alpha, sigma, labels) for f in (self.problem.x0, self.problem.noise))
        a, s = (c.to(x0.device, x0.dtype).reshape(-1, *(1,) * (x.ndim - 1)) for c in (alpha, sigma))
        answers = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}
        return answers[self.prediction].to(x.dtype)


@register("gaussian")
def gaussian(
    mean: float | list[Any] = 0.0,
    std: float | list[Any] = 0.5,
    in_channels: int = 3,
    image_size: int = 16,
    schedule: Schedule | str = "flow",
    prediction: str = "x0",
) -> Analytic:
    """Ideal denoiser of pictures whose numbers are Gaussian, independently: exact, without training.

    Args:
        mean, std: a number, one a channel, or nested lists (c, h, w).
        in_channels, image_size: of the picture (wired in a recipe, as are the two below).
        schedule: a schedule or the name of one.
        prediction: what it answers: x0, eps, v or flow.
    """
    shape = (in_channels, image_size, image_size)
    data = Gaussian(_pictures(mean, shape)[0], _pictures(std, shape)[0])
    return Analytic(data, schedule, prediction)


@register("gaussian_mixture")
def gaussian_mixture(
    means: list[Any] | None = None,
    stds: float | list[Any] = 0.2,
    weights: list[float] | None = None,
    in_channels: int = 3,
    image_size: int = 16,
    schedule: Schedule | str = "flow",
    prediction: str = "x0",
) -> Analytic:
    """Ideal denoiser of a mixture of Gaussians over pictures: exact, without training.

    Args:
        means: one entry a component: a number, one a channel, or nested lists (c, h, w); None = four waves.
        stds: a number, or one entry a component.
        weights: one a component, equal when None.
        in_channels, image_size, schedule, prediction: as for ``gaussian``.
    """
    shape = (in_channels, image_size, image_size)
    centres = patterns(4, shape) if means is None else _pictures(means, shape, each=True)
    widths = _pictures(stds, shape, each=isinstance(stds, list))
    return Analytic(GaussianMixture(weights or [1.0] * len(centres), centres, widths), schedule, prediction)


@register("finite_data")
def finite_data(
    points: list[Any] | None = None,
    weights: list[float] | None = None,
    in_channels: int = 3,
    image_size: int = 16,
    schedule: Schedule | str = "flow",
    prediction: str = "x0",
) -> Analytic:
    """Ideal denoiser of finitely many pictures: what a network that knows its training set by heart answers.

    Args:
        points: one entry a picture, as ``means`` of ``gaussian_mixture``; None = four waves.
        weights: one a picture, equal when None.
        in_channels, image_size, schedule, prediction: as for ``gaussian``.
    """
    shape = (in_channels, image_size, image_size)
    data = patterns(4, shape) if points is None else _pictures(points, shape, each=True)
    return Analytic(FiniteData(data, weights), schedule, prediction)


def _pictures(values: Values, shape: tuple[int, int, int], each: bool = False) -> Tensor:
    """(k or 1, c, h, w): a number a picture, a number a channel, or every number."""
    pictures = []
    for value in values if each else [values]:  # type: ignore[union-attr]
        numbers = as_numbers(value)
        if numbers.shape == shape[:1]:
            numbers = numbers[:, None, None]
        if numbers.shape not in ((), shape, (shape[0], 1, 1)):
            raise KitError(f"a picture's numbers are one, {shape[0]} or {shape}, not {tuple(numbers.shape)}")
        pictures.append(numbers.expand(shape))
    if not pictures:
        raise KitError("data must have at least one entry")
    return torch.stack(pictures)

"""Ideal denoisers in closed form: data whose E[x0 | x] is known exactly, so that samplers can be judged exactly.

For x = alpha x0 + sigma eps and x0 from a mixture of Gaussians with weights w_k, means m_k and standard
deviations s_k per number, every component's x is Gaussian too, with std_k² = alpha² s_k² + sigma², and with
r_k = P(k | x) (Bayes; a softmax)

    E[x0  | x] = Σ r_k (sigma² m_k + alpha s_k² x) / std_k²
    E[eps | x] = Σ r_k sigma (x - alpha m_k) / std_k²

No formula divides by alpha, nor by a difference of like numbers, so both hold to rounding from pure noise
(alpha = 0) to the clean end. A Gaussian is a mixture of one, a finite data set one with s_k = 0.
Axes: b batch, k components, n = the numbers of one sample, flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown
from imagen_kit.schedules.base import Schedule

#: Numbers as Python or YAML writes them, or a tensor.
Values = float | Sequence[Any] | Tensor
DenoiseFn = Callable[[Tensor, float | Tensor], Tensor]


def as_numbers(values: Values) -> Tensor:
    """A float64 tensor on the CPU, also where the default device is another (recipes are tried on meta)."""
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise KitError(f"data must be numbers in lists of equal length: {error}") from error


class GaussianMixture:
    """x0 ~ Σ w_k N(m_k, diag s_k²).

    Args:
        weights: (k,) positive; scaled to sum 1.
        means: (k, *shape): shape (2,) for points in the plane, (c, h, w) for pictures in [-1, 1].
        stds: standard deviations from 0, per number: anything that broadcasts to (k, *shape).

    Raises:
        KitError: weights that are not positive, shapes that do not fit, a negative deviation.
    """

    def __init__(self, weights: Values, means: Values, stds: Values):
        weights, means, stds = (as_numbers(v) for v in (weights, means, stds))
        if means.ndim < 2 or weights.shape != means.shape[:1] or not len(weights):
            shapes = f"{tuple(weights.shape)} and {tuple(means.shape)}"
            raise KitError(f"a mixture needs weights (k,) and means (k, ...), not shapes {shapes}")
        if not (weights > 0).all() or not all(v.isfinite().all() for v in (weights, means, stds)):
            raise KitError("a mixture's weights must be above 0, and all its numbers finite")
        if (stds < 0).any():
            raise KitError("a mixture's standard deviations must not be negative")
        try:
            stds = stds.expand(means.shape)
        except RuntimeError as error:
            shapes = f"{tuple(stds.shape)} do not fit means of shape {tuple(means.shape)}"
            raise KitError(f"a mixture's standard deviations of shape {shapes}") from error
        self.shape = tuple(means.shape[1:])
        log_weights = (weights / weights.sum()).log()
        self._home = (log_weights, means.flatten(1), stds.flatten(1))
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def weights(self) -> Tensor:
        """(k,) float64, sum 1."""
        return self._home[0].exp()

    @property
    def means(self) -> Tensor:
        """(k, *shape) float64."""
        return self._home[1].unflatten(1, self.shape)

    @property
    def stds(self) -> Tensor:
        """(k, *shape) float64."""
        return self._home[2].unflatten(1, self.shape)

    @property
    def mean(self) -> Tensor:
        """(*shape) float64 mean of the data."""
        return (self.weights[:, None] * self._home[1]).sum(0).reshape(self.shape)

    @property
    def covariance(self) -> Tensor:
        """(n, n) float64 covariance of the flattened data: Σ w (diag s² + (m - mean)(m - mean)ᵀ)."""
        _, means, stds = self._home
        centred = means - self.mean.flatten()
        spread = (self.weights[:, None] * stds.square()).sum(0).diag()
        return spread + (self.weights[:, None] * centred).T @ centred

    def x0(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """E[x0 | x]: (b, *shape) of x's dtype.

        Args:
            x: (b, *shape) = alpha x0 + sigma eps, any device and floating dtype; the work is done in x's
                dtype, float32 at least.
            alpha, sigma: floats, or (b,) tensors; both from 0, and not both 0.
            labels: (b,) component each sample is known to come from; k or more = unknown. None = all unknown.
        """
        flat, share, std, alpha, sigma = self._posterior(x, alpha, sigma, labels)
        _, means, stds = self._at(flat)
        answer = (sigma / std).square() * means + alpha * (stds / std).square() * flat[:, None]
        return (share[..., None] * answer).sum(1).to(x.dtype).reshape(x.shape)

    def noise(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """E[eps | x]: (b, *shape) of x's dtype; arguments as in ``x0``."""
        flat, share, std, alpha, sigma = self._posterior(x, alpha, sigma, labels)
        answer = sigma / std * ((flat[:, None] - alpha * self._at(flat)[1]) / std)
        return (share[..., None] * answer).sum(1).to(x.dtype).reshape(x.shape)

    def denoise(self, schedule: Schedule, labels: Tensor | None = None) -> DenoiseFn:
        """The ideal network on a schedule: (x (b, *shape), t float or (b,)) -> x0, as samplers call it."""

        def denoise(x: Tensor, t: float | Tensor) -> Tensor:
            alpha, sigma = schedule.alpha_sigma(t)
            return self.x0(x, alpha, sigma, labels)

        return denoise

    def log_prob(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """(b,) log-density of alpha x0 + sigma eps at x (b, *shape), differentiable; the data's own by default."""
        flat, alpha, sigma = self._inputs(x, alpha, sigma)
        logits = self._logits(flat, alpha, self._std(flat, alpha, sigma))
        return torch.logsumexp(logits, 1) - flat.shape[1] / 2 * math.log(2 * math.pi)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) float64 draws of x0, on the CPU."""
        _, means, stds = self._home
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, means.shape[1], generator=generator, dtype=torch.float64)
        return (means[component] + stds[component] * noise).reshape(n, *self.shape)

    def _at(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log weights (k,), means and deviations (k, n) beside ``like``; copied there once."""
        key = (like.device, like.dtype)
        if key not in self._placed:
            log_weights, means, stds = (v.to(like.device, like.dtype) for v in self._home)
            self._placed[key] = (log_weights, means, stds)
        return self._placed[key]

    def _inputs(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """x (b, n) in the working dtype, and coefficients that broadcast against (b, k, n)."""
        if tuple(x.shape[1:]) != self.shape:
            raise KitError(f"this data has shape {self.shape}, but x is {tuple(x.shape)}")
        flat = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
        # Data without width has std = sigma, whose square must not leave the dtype; for all other data this
        # is the clean end: a sigma of 3e-10 (float32) or 1e-77 (float64).
        least = torch.finfo(flat.dtype).tiny ** 0.25
        if not isinstance(sigma, Tensor) or not isinstance(alpha, Tensor):
            return flat, alpha, max(float(sigma), least)
        alpha, sigma = (c.to(flat.device, flat.dtype).reshape(-1, 1, 1) for c in (alpha, sigma))
        return flat, alpha, sigma.clamp(min=least)

    def _std(self, flat: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """(1 or b, k, n) deviation of x in every component."""
        return ((alpha * self._at(flat)[2][None]).square() + sigma * sigma).sqrt()

    def _logits(self, flat: Tensor, alpha: float | Tensor, std: Tensor) -> Tensor:
        """(b, k) log of weight times density, but for the constant of 2 pi."""
        log_weights, means, _ = self._at(flat)
        z = (flat[:, None] - alpha * means) / std
        return log_weights - 0.5 * z.square().sum(-1) - std.log().sum(-1)

    def _posterior(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, float | Tensor, float | Tensor]:
        flat, alpha, sigma = self._inputs(x, alpha, sigma)
        std = self._std(flat, alpha, sigma)
        logits = self._logits(flat, alpha, std)
        if labels is not None:
            count = logits.shape[1]
            labels = labels.to(x.device).reshape(-1, 1)
            other = (torch.arange(count, device=x.device) != labels) & (labels < count)
            logits = logits.masked_fill(other, -math.inf)
        return flat, torch.softmax(logits, 1), std, alpha, sigma


class Gaussian(GaussianMixture):
    """x0 ~ N(mean, diag std²): every sampler's answer is linear, and the flow has a closed form.

    Args:
        mean: (*shape).
        std: standard deviations from 0, broadcast to the mean's shape.
    """

    def __init__(self, mean: Values, std: Values = 1.0):
        super().__init__([1.0], as_numbers(mean)[None], as_numbers(std)[None])


class FiniteData(GaussianMixture):
    """x0 is one of finitely many points: the ideal network of a training set, which reproduces it.

    Args:
        points: (k, *shape).
        weights: (k,) positive, equal when None.
    """

    def __init__(self, points: Values, weights: Values | None = None):
        points = as_numbers(points)
        super().__init__([1.0] * len(points) if weights is None else weights, points, 0.0)


# ---- the exact solution ----------------------------------------------------------------------------------------


def solve_ode(
    problem: GaussianMixture, x: Tensor, schedule: Schedule, t_from: float, t_to: float, rtol: float = 1e-12
) -> Tensor:
    """The probability-flow ODE solved from native time ``t_from`` to ``t_to``: what samplers converge to.

    With theta = atan2(sigma, alpha) and y = x / hypot(alpha, sigma) it reads dy/dtheta = cos(theta) E[eps | y]
    - sin(theta) E[x0 | y] on every schedule, without a singular end. A Gaussian keeps its quantiles: (x - alpha
    mean) / std stays. All else is integrated by scipy's DOP853 in float64.

    Args:
        x: (b, *shape) states at ``t_from``.
        rtol: relative tolerance of the integration (a tenth of it absolute).

    Returns:
        (b, *shape) states at ``t_to``, of x's dtype and device.
    """
    (a0, s0), (a1, s1) = (schedule.alpha_sigma(float(t)) for t in (t_from, t_to))
    state = x.detach().cpu().double()
    if isinstance(problem, Gaussian):
        mean, std = problem.means[0], problem.stds[0]
        growth = (a1 * std).square().add(s1 * s1).sqrt() / (a0 * std).square().add(s0 * s0).sqrt()
        return (a1 * mean + growth * (state - a0 * mean)).to(x.device, x.dtype)
    from scipy.integrate import solve_ivp

    # Data without width is singular at sigma = 0. A ten-thousandth of the distance between two points before
    # it all weight lies on one of them, and x0 is the end.
    start, end = math.atan2(s0, a0), max(math.atan2(s1, a1), 1e-4 * _gap(problem))

    def velocity(theta: float, flat: Any) -> Any:
        y, alpha, sigma = torch.from_numpy(flat).reshape(state.shape), math.cos(theta), math.sin(theta)
        v = alpha * problem.noise(y, alpha, sigma) - sigma * problem.x0(y, alpha, sigma)
        return v.flatten().numpy()

    begin = (state / math.hypot(a0, s0)).flatten().numpy()
    solution = solve_ivp(velocity, (start, end), begin, method="DOP853", rtol=rtol, atol=rtol / 10)
    y = torch.from_numpy(solution.y[:, -1].copy()).reshape(state.shape)
    if end > math.atan2(s1, a1):
        x0, eps = (f(y, math.cos(end), math.sin(end)) for f in (problem.x0, problem.noise))
        return (a1 * x0 + s1 * eps).to(x.device, x.dtype)
    return (y * math.hypot(a1, s1)).to(x.device, x.dtype)


def _gap(problem: GaussianMixture) -> float:
    """The smallest distance between components where one has a number without width; 0 where none has."""
    if problem.stds.min() > 0 or len(problem.means) == 1:
        return 0.0
    return torch.pdist(problem.means.flatten(1)).min().item()


# ---- named problems ----------------------------------------------------------------------------------------------


def patterns(count: int, shape: Sequence[int]) -> Tensor:
    """(count, c, h, w) smooth pictures in [-0.8, 0.8], no two alike: waves of different direction and phase."""
    c, h, w = shape
    rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") / n * 2 * math.pi for n in (h, w))
    pictures = []
    for k in range(count):
        wave = (k % 3) * rows[:, None] + ((k + 1) // 2 % 3 + (k % 3 == 0)) * columns
        pictures.append(
            torch.stack([0.8 * torch.cos(wave + 0.7 * k + 2.1 * channel) for channel in range(c)])
        )
    return torch.stack(pictures)


def _gmm2d() -> GaussianMixture:
    """Four Gaussians in the plane: the data of the recorded sampler runs."""
    means = [[-1.2, 0.6], [0.9, 1.1], [0.3, -0.9], [1.6, -0.2]]
    stds = [[0.25, 0.35], [0.3, 0.2], [0.4, 0.25], [0.15, 0.3]]
    return GaussianMixture([0.35, 0.25, 0.3, 0.1], means, stds)


def _gmm_image() -> GaussianMixture:
    """Six wave pictures (3, 16, 16) with noise of standard deviation 0.1 to 0.3 on them."""
    stds = torch.linspace(0.1, 0.3, 6, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return GaussianMixture([3.0, 2.0, 2.0, 1.0, 1.0, 1.0], patterns(6, (3, 16, 16)), stds)


def _points() -> FiniteData:
    """Eight points on the circle of radius 1.2, the last three half as likely."""
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4) + 0.2
    return FiniteData(1.2 * torch.stack([angles.cos(), angles.sin()], 1), [2.0] * 5 + [1.0] * 3)


PROBLEMS: dict[str, Callable[[], GaussianMixture]] = {
    "gaussian": lambda: Gaussian([0.4, -0.7], [0.5, 1.3]),
    "gmm2d": _gmm2d,
    "gmm_image": _gmm_image,
    "points": _points,
}


def problem(name: str) -> GaussianMixture:
    """A problem by name: ``gaussian``, ``gmm2d`` and ``points`` in the plane, ``gmm_image`` (3, 16, 16).

    Raises:
        KitError: unknown name, with the nearest one.
    """
    if name not in PROBLEMS:
        raise KitError(unknown("analytic problem", name, PROBLEMS))
    return PROBLEMS[name]()

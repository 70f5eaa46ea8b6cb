"""What the network's output means: the one place that converts it, and that makes training targets.

With x = alpha x0 + sigma noise every convention here is affine in (x, output), so each is two numbers a, b
with x0 = a x + b output (``coefficients``) and everything else follows:

    eps   noise                                      x0 = (x - sigma e) / alpha
    x0    the clean picture                          x0 = o
    v     alpha noise - sigma x0                     x0 = (alpha x - sigma v) / (alpha² + sigma²)
    flow  noise - x0, the straight-line velocity     x0 = (x - sigma u) / (alpha + sigma)
    edm   F of Karras et al. 2022, eq. 7             x0 = c_skip x/alpha + c_out F at noise level sigma/alpha
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from imagen_kit.errors import KitError, unknown

PREDICTIONS = ("eps", "x0", "v", "flow", "edm")
WEIGHTS = ("uniform", "min_snr", "edm")

Scalar = TypeVar("Scalar", float, Tensor)


def check(prediction: str) -> str:
    """``prediction``, when it is known; KitError with the nearest name otherwise."""
    if prediction not in PREDICTIONS:
        raise KitError(unknown("prediction", prediction, PREDICTIONS))
    return prediction


def coefficients(
    prediction: str, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> tuple[Scalar, Scalar]:
    """(a, b) with x0 = a x + b output.

    Args:
        alpha, sigma: floats, or float64 tensors of one shape.
        sigma_data: standard deviation of the data, used by ``edm`` only.

    Raises:
        KitError: unknown prediction, or ``eps`` / ``edm`` at a float alpha of 0, where x holds nothing of x0
            and the
            output does not tell it (train with v, flow or x0 for zero terminal SNR). Tensors give inf there.
    """
    check(prediction)
    if prediction in ("eps", "edm") and not isinstance(alpha, Tensor) and alpha == 0:
        raise KitError(f"prediction {prediction!r} does not tell x0 where alpha = 0; use 'v', 'flow' or 'x0'")
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return 0 * alpha, 0 * alpha + 1
    if prediction == "v":
        norm = alpha * alpha + sigma * sigma
        return alpha / norm, -sigma / norm
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    level2, data2 = (sigma / alpha) ** 2, sigma_data * sigma_data
    return data2 / (level2 + data2) / alpha, (sigma / alpha) * sigma_data / _sqrt(level2 + data2)


def to_x0(
    prediction: str, output: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> Tensor:
    """x0 from the network's output. alpha and sigma: floats, or (b,) tensors against (b, ...) pictures.

    The result has the pictures' promoted dtype; coefficients are applied in float32 or better.
    """
    return _combine(coefficients(prediction, alpha, sigma, sigma_data), x, output)


def from_x0(
    prediction: str, x0: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> Tensor:
    """The output that stands for ``x0``: inverse of ``to_x0``.

    Raises:
        KitError: at a float sigma of 0, where every convention but x0 loses its output (b = 0).
    """
    if prediction == "x0":
        return x0
    a, b = coefficients(prediction, alpha, sigma, sigma_data)
    if not isinstance(b, Tensor) and b == 0:
        raise KitError(f"prediction {prediction!r} cannot be told from x0 where sigma = 0")
    return _combine((-a / b, 1 / b), x, x0)


def to_eps(
    prediction: str, output: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> Tensor:
    """The noise in ``x`` by the network's output: (x - alpha x0) / sigma, written without dividing by alpha.

    For eps, v and flow it stays finite at sigma = 0; x0 and edm raise a KitError at a float sigma of 0.
    """
    check(prediction)
    if prediction == "eps":
        return output
    if prediction == "v":
        norm = alpha * alpha + sigma * sigma
        return _combine((sigma / norm, alpha / norm), x, output)
    if prediction == "flow":
        return _combine((1 / (alpha + sigma), alpha / (alpha + sigma)), x, output)
    if not isinstance(sigma, Tensor) and sigma == 0:
        raise KitError(
            f"prediction {prediction!r} does not tell the noise where sigma = 0; use 'eps', 'v' or 'flow'"
        )
    a, b = coefficients(prediction, alpha, sigma, sigma_data)
    return _combine(((1 - alpha * a) / sigma, -alpha * b / sigma), x, output)


def target(
    prediction: str, x0: Tensor, noise: Tensor, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> Tensor:
    """What the network should answer for x = alpha x0 + sigma noise. Shapes as in ``to_x0``.

    The edm target is that of Karras et al. 2022, eq. 8, with sigma/alpha as the noise level.
    """
    check(prediction)
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "flow":
        return noise - x0
    if prediction == "v":
        return _combine((alpha, -sigma), noise, x0)
    # With r = sigma/alpha and d = sigma_data: (x0 - c_skip (x0 + r n)) / c_out = (r x0 - d² n) / (d sqrt(r²
    # + d²)).
    ratio = sigma / alpha
    scale = sigma_data * _sqrt(ratio * ratio + sigma_data * sigma_data)
    return _combine((ratio / scale, -sigma_data * sigma_data / scale), x0, noise)


def network_input(
    prediction: str, x: Tensor, t: Scalar, alpha: Scalar, sigma: Scalar, sigma_data: float = 0.5
) -> tuple[Tensor, Scalar]:
    """(x as the network sees it, the time it is told).

    Both are unchanged but for edm: c_in x / alpha and ln(sigma / alpha) / 4 (Karras et al. 2022, Table 1).
    """
    if check(prediction) != "edm":
        return x, t
    ratio = sigma / alpha
    scale = 1 / (alpha * _sqrt(ratio * ratio + sigma_data * sigma_data))
    time = ratio.log() / 4 if isinstance(ratio, Tensor) else math.log(ratio) / 4
    return _combine((scale,), x), time


def loss_weight(
    prediction: str,
    alpha: Scalar,
    sigma: Scalar,
    kind: str = "uniform",
    gamma: float = 5.0,
    sigma_data: float = 0.5,
) -> Scalar:
    """Weight of the squared error of the network's output.

    Every kind but ``uniform`` is stated on x0's squared error and carried over by b² (x0's error is b times
    the
    output's), so that eps, x0, v, flow and edm networks are weighted alike:

        uniform   1 on the output's own error
        min_snr   min(alpha²/sigma², gamma) on x0 (Hang et al. 2023, eq. 9); for v this is
                  min(SNR, gamma)/(SNR + 1) on variance-preserving schedules
        edm       (level² + sigma_data²) / (level sigma_data)² on x0, level = sigma/alpha (Karras et al. 2022)

    At sigma = 0 the limit is taken where one exists: 0 for min_snr with b = 0.

    Raises:
        KitError: unknown prediction or kind.
    """
    check(prediction)
    if kind not in WEIGHTS:
        raise KitError(unknown("loss weight", kind, WEIGHTS))
    if kind == "uniform":
        return 0 * alpha + 1
    _, b = coefficients(prediction, alpha, sigma, sigma_data)
    if kind == "edm":
        if prediction == "edm":
            return 0 * alpha + 1
        data2 = sigma_data * sigma_data
        return b * b * ((alpha / sigma) ** 2 + 1 / data2)
    if isinstance(alpha, Tensor):
        return b * b * ((alpha / sigma) ** 2).clamp(max=gamma)
    return b * b * min((alpha / sigma) ** 2 if sigma else math.inf, gamma)


def _sqrt(value: Scalar) -> Scalar:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _combine(weights: tuple[float | Tensor, ...], *pictures: Tensor) -> Tensor:
    """Σ weight · picture; weights are floats or (b,) tensors, applied in float32 or better."""
    dtype = pictures[0].dtype
    for picture in pictures[1:]:
        dtype = torch.promote_types(dtype, picture.dtype)
    work = torch.promote_types(dtype, torch.float32)
    total: Tensor | None = None
    for weight, picture in zip(weights, pictures, strict=True):
        if isinstance(weight, Tensor):
            weight = weight.to(device=picture.device, dtype=work)
            weight = weight.reshape(weight.shape + (1,) * (picture.ndim - weight.ndim))
        term = picture.to(work) * weight
        total = term if total is None else total + term
    assert total is not None
    return total.to(dtype)

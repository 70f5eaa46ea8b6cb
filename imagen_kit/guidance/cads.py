"""Condition-annealed sampling: noise on the conditioning, less and less of it (Sadat et al. 2023, CADS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imagen_kit.conditioning import Cond
from imagen_kit.errors import KitError
from imagen_kit.guidance import register
from imagen_kit.guidance.base import Conditioning, Generators, Guidance, Step, number
from imagen_kit.guidance.vectors import cast
from imagen_kit.sending import send

BLOCK = 16  # tokens whose noise is drawn together


class Draws:
    """Noise of one run: a function of each sample's seed, of the evaluation and of the token alone.

    So neither the batch nor the padding of the texts enters.
    """

    def __init__(self, generator: Generators):
        self._generator = generator
        self._seeds: list[int] = []
        self._calls = 0

    def begin(self, batch: int) -> list[torch.Generator]:
        """A generator a sample, for one evaluation."""
        if not self._seeds:
            single = isinstance(self._generator, torch.Generator)
            sources: Sequence[Any] = [self._generator] * batch if single else list(self._generator)  # type: ignore[arg-type]
            self._seeds = [
                int(torch.randint(2**62, (), generator=source, device=source.device)) for source in sources
            ]
        if len(self._seeds) != batch:
            raise KitError(f"guidance cads has {len(self._seeds)} generators for a batch of {batch}")
        self._calls += 1
        # any bijection of the pair would do; a golden-ratio step spreads the calls over the seeds
        step = self._calls * 0x9E3779B97F4A7C15
        return [torch.Generator().manual_seed((seed + step) % 2**63) for seed in self._seeds]


def normal(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal of the shape of (b, d) or (b, n, d), float32; a token's does not depend on n."""
    shape = like.shape[1:]
    if like.ndim == 2:
        noise = torch.stack([torch.randn(shape, generator=source) for source in generators])
    else:
        blocks = [(BLOCK, *shape[1:])] * -(-shape[0] // BLOCK)
        noise = torch.stack(
            [
                torch.cat([torch.randn(block, generator=source) for block in blocks])[: shape[0]]
                for source in generators
            ]
        )
    return send(noise, like.device)


@register("cads", extra_evaluations="none", works_in="conditioning")
@dataclass(frozen=True)
class CADS(Guidance):
    """The network is told √γ·y + noise·√(1 − γ)·n instead of the conditioning y (Sadat et al. 2023).

    γ is 0 while the time u is above ``high``, 1 below ``low``, and linear between; u falls from 1 at the noisy
    start to 0 at the end, by steps. Pictures of one prompt differ more. ``uncond`` is left as it is. The
    noised conditioning is brought back to y's mean and spread, sample by sample: ``rescale``·that + (1 −
    ``rescale``)·the noised one. Noise 0 is plain sampling.

    The noise comes from the generators of the run (``denoise.begin(generator=)``, which samplers and pipeline
    call), so a seed repeats its picture in any batch. Token and pooled embeddings are noised, labels not.

    Args:
        noise: scale s of the noise, from 0.
        low, high: τ₁ ≤ τ₂ in [0, 1].
        rescale: ψ in [0, 1].

    Raises:
        KitError: a number out of range, low above high; when called, a run without generator or grid, or a
            conditioning without embeddings.
    """

    noise: float = 0.25
    low: float = 0.6
    high: float = 0.9
    rescale: float = 1.0
    draws: Draws | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number(self.noise, "cads noise", low=0.0)
        for option in ("low", "high", "rescale"):
            number(getattr(self, option), f"cads {option}", 0.0, 1.0)
        if self.low > self.high:
            raise KitError(f"cads needs low ≤ high, got ({self.low}, {self.high})")

    def gamma(self, step: Step) -> float | Tensor:
        """The part of the conditioning that is left, in [0, 1]."""
        u = 1 - step.progress
        if isinstance(u, Tensor):
            if self.low == self.high:
                return (u <= self.low).to(u.dtype)
            return ((self.high - u) / (self.high - self.low)).clamp(0, 1)
        if u <= self.low:
            return 1.0
        return max(0.0, (self.high - u) / (self.high - self.low)) if u < self.high else 0.0

    def active(self, step: Step) -> bool:
        if not self.noise:
            return False
        gamma = self.gamma(step)
        return isinstance(gamma, Tensor) or gamma < 1

    def begin(self, generator: Generators | None = None) -> CADS:
        run = replace(self)
        object.__setattr__(run, "draws", None if generator is None else Draws(generator))
        return run

    def condition(self, cond: Conditioning | None, step: Step) -> Conditioning:
        if self.draws is None:
            raise KitError(
                "guidance cads draws noise: give the sampler a generator, or denoise = "
                "denoise.begin(times, generator)"
            )
        if isinstance(cond, Tensor) and cond.is_floating_point() and cond.ndim in (2, 3):
            return self._noised(cond, None, self.draws.begin(len(cond)), step)
        if not isinstance(cond, Cond) or (cond.tokens is None and cond.pooled is None):
            raise KitError("guidance cads noises text embeddings, but the conditioning has none")
        sources = self.draws.begin(cond.batch or 0)
        # pooled first: how much the tokens draw goes by their padding
        pooled = None if cond.pooled is None else self._noised(cond.pooled, None, sources, step)
        tokens = None if cond.tokens is None else self._noised(cond.tokens, cond.mask, sources, step)
        return replace(cond, tokens=tokens, pooled=pooled)

    def _noised(self, y: Tensor, mask: Tensor | None, sources: list[torch.Generator], step: Step) -> Tensor:
        """y (b, d) or (b, n, d) with noise where mask (b, n) is true and the strategy acts."""
        work, real = y.float(), torch.ones_like(y, dtype=torch.bool)
        if mask is not None and y.ndim == 3:
            real = mask[:, :, None].expand_as(y)
        gamma = cast(self.gamma(step), work)
        if isinstance(gamma, Tensor):
            gamma = gamma.reshape(-1, *(1,) * (y.ndim - 1))
        mixed = gamma**0.5 * work + self.noise * (1 - gamma) ** 0.5 * normal(work, sources)
        mean, spread = moments(work, real)
        mean_, spread_ = moments(mixed, real)
        back = (mixed - mean_) / spread_.clamp_min(torch.finfo(work.dtype).tiny) * spread + mean
        noised = torch.where(real, self.rescale * back + (1 - self.rescale) * mixed, work)
        if step.where is not None:
            noised = torch.where(step.where.reshape(-1, *(1,) * (y.ndim - 1)), noised, work)
        return noised.to(y.dtype)


def moments(values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample's real values, (b, 1, ...) each."""
    axes, count = tuple(range(1, values.ndim)), real.flatten(1).sum(1).clamp_min(2)
    count = count.reshape(-1, *(1,) * (values.ndim - 1))
    mean = (values * real).sum(axes, keepdim=True) / count
    square = ((values - mean).square() * real).sum(axes, keepdim=True) / (count - 1)
    return mean, square.sqrt()

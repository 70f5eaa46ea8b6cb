"""Which sampler of ours replays the peer's DDPM, Euler ancestral, EDM, SA-Solver, LCM and TCD schedulers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from golden_data import Golden, UnknownRunError
from golden_deterministic import FLAG, dpm_multistep, ours
from golden_runs import Network, Plan, Translator
from torch import Tensor

from imagen_kit.samplers.base import Run
from imagen_kit.samplers.ddpm import Ddpm, variances
from imagen_kit.samplers.exponential import Evaluation
from imagen_kit.samplers.sa_solver import SaSolver
from imagen_kit.samplers.tableau import Form

NUMBER = (int, float)
#: The peer clamps variances to this before it takes their logarithm.
LEAST = 1e-20
#: Constructor arguments of latent consistency that only choose the grid, which is recorded.
DISTILLED = ("original_inference_steps",)


@dataclass(frozen=True, kw_only=True)
class NoisyEnd(Ddpm):
    """The peer adds noise in every call but those at t = 0, to the final x0 too where its grid ends earlier:
    of beta with the large variance, of the clamped one with the small. Here it is added as well.
    """

    def solve(self, x: Form, run: Run) -> Form:
        end, (now, then) = super().solve(x, run), run.points[-2:]
        if now.t == 0:
            return end
        small, large = variances(now, then)
        variance = large if self.variance == "fixed_large" else max(small, LEAST)
        return run.step(end + math.sqrt(variance) * run.noise())

    def _spans(self, *args: Any) -> list[list[float]]:
        return [[max(log, math.log(LEAST)) for log in pair] for pair in super()._spans(*args)]  # type: ignore[union-attr]


def ddpm(golden: Golden) -> Plan:
    """DDPMScheduler, all its variances but the two that take the root of a negative number."""
    known = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    variance = golden.option("variance_type", "fixed_small", known).removesuffix("_log")
    return Plan(partial(NoisyEnd, variance=variance), Network(golden, golden.limiter(clips_by_default=True)))


def euler_ancestral(golden: Golden) -> Plan:
    """EulerAncestralDiscreteScheduler."""
    return Plan(ours("euler_ancestral"), Network(golden))


@dataclass(frozen=True)
class EarlyAnswer(Network):
    """The network of EDM runs with churn: the peer asks it, and adds the noise then.

    What it has of the network is F = (x0 - c_skip x)/c_out at the state and level before; x0 is made of that
    and the noisier state with c_skip and c_out of the level after.
    """

    s_noise: float = 1.0
    sigma_data: float = 0.5

    def before(self, x: Tensor, t: float, call: int) -> Tensor:
        """The state without the noise of this call."""
        level, drawn = self.golden.levels[call], self.golden.noise_of_call(call)
        return x - self.s_noise * (t**2 - level**2) ** 0.5 * drawn[0] if drawn else x

    def shown(self, x: Tensor, t: float, call: int) -> Tensor:
        return self.before(x, t, call)

    def x0(self, x: Tensor, t: float, call: int) -> Tensor:
        level, state = self.golden.levels[call], self.before(x, t, call)
        (skip, out), (skip_then, out_then) = self.scalings(level), self.scalings(t)
        raw = (self.golden.mixture(state, 1.0, level)[0] - skip * state) / out
        return skip_then * x + out_then * raw

    def scalings(self, level: float) -> tuple[float, float]:
        """c_skip and c_out (Karras et al. 2022, Table 1)."""
        total = level**2 + self.sigma_data**2
        return self.sigma_data**2 / total, level * self.sigma_data / total**0.5


def edm_euler(golden: Golden) -> Plan:
    """EDMEulerScheduler, with churn or without."""
    golden.option("final_sigmas_type", "zero", ("zero", "sigma_min"))
    data = golden.option("sigma_data", 0.5, NUMBER)
    churn, low = (golden.argument(name, 0.0, NUMBER) for name in ("s_churn", "s_tmin"))
    high, scale = golden.argument("s_tmax", math.inf, NUMBER), golden.argument("s_noise", 1.0, NUMBER)
    sampler = ours("edm", solver="euler", s_churn=churn, s_tmin=low, s_tmax=high, s_noise=scale)
    network = EarlyAnswer(golden, s_noise=scale, sigma_data=data)
    return Plan(sampler, network, noise_first=True)


def edm_multistep(golden: Golden) -> Plan:
    """EDMDPMSolverMultistepScheduler."""
    golden.option("sigma_data", 0.5, NUMBER)
    return dpm_multistep(golden)


class StalledSaSolver(SaSolver):
    """A last step of no length, of several points in the peer: whatever its order it changes nothing."""

    def predict(self, answers: list[Evaluation], step: Any) -> Form:
        return super().predict(answers[:1] if step.then.lam == step.now.lam else answers, step)


def sa_solver(golden: Golden) -> Plan:
    """SASolverScheduler. ``tau`` null is its default: 1 at times from 200 to 800, else 0."""
    expands = golden.option("algorithm_type", "data_prediction", ("data_prediction", "noise_prediction"))
    golden.option("variance_type", None, (None,))
    golden.option("tau_func", None, (None,))
    limit = golden.limiter()
    if expands == "noise_prediction" and golden.option("thresholding", False):
        raise UnknownRunError(f"{golden}: the peer cannot threshold with noise prediction")
    constant, times = golden.meta["tau"], golden["timesteps"].tolist()
    taus = [float(200 <= t <= 800) if constant is None else constant for t in times]
    # The peer's time is a whole number; ours says the same place of the grid.
    known = {point.t: tau for point, tau in zip(golden.points(), taus, strict=False)}
    sampler = partial(
        StalledSaSolver,
        tau=known.__getitem__,
        predictor_order=golden.option("predictor_order", 2, (1, 2, 3, 4)),
        corrector_order=golden.option("corrector_order", 2, (1, 2, 3, 4)),
        lower_order_final=golden.option("lower_order_final", True, FLAG),
        expands="data" if expands == "data_prediction" else "noise",
    )
    return Plan(sampler, Network(golden, limit))


def lcm(golden: Golden) -> Plan:
    """LCMScheduler."""
    for name in DISTILLED:
        golden.option(name, 50, (int,))
    scaling = golden.option("timestep_scaling", 10.0, NUMBER)
    return Plan(ours("lcm", timestep_scaling=scaling), Network(golden, golden.limiter()))


def tcd(golden: Golden) -> Plan:
    """TCDScheduler. It ends at time 0, not at sigma = 0, limits nothing, and scales no time."""
    for name in DISTILLED:
        golden.option(name, 50, (int,))
    golden.option("timestep_scaling", 10.0, NUMBER)
    golden.limiter()
    gamma = golden.argument("eta", 0.3, NUMBER)
    points = [*golden.points()[:-1], golden.at(0.0)]
    return Plan(ours("tcd", gamma=gamma), Network(golden), points)


TRANSLATE: dict[str, Translator] = {
    "DDPMScheduler": ddpm,
    "EDMDPMSolverMultistepScheduler": edm_multistep,
    "EDMEulerScheduler": edm_euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "LCMScheduler": lcm,
    "SASolverScheduler": sa_solver,
    "TCDScheduler": tcd,
}

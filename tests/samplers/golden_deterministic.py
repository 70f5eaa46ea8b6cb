"""Which sampler of ours replays the peer's Euler, Heun, LMS, DPM-Solver, DEIS, UniPC, PNDM and flow schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from golden_data import Golden, UnknownRunError
from golden_runs import Misasked, Network, Plan, Translator
from torch import Tensor

from imagen_kit import samplers
from imagen_kit.samplers.base import Run, Sampler
from imagen_kit.samplers.dpm_singlestep import Dpmpp3s
from imagen_kit.samplers.exponential import Evaluation
from imagen_kit.samplers.grid import Point
from imagen_kit.samplers.sde import Dpmpp3mSde
from imagen_kit.samplers.tableau import Form

FLAG = (False, True)
#: Values of ``solver_type`` that a peer takes for its own default, so that configurations can be exchanged.
MIDPOINT_TOO = ("logrho", "bh1", "bh2")
BH2_TOO = ("midpoint", "heun", "logrho")
#: Below this many steps the peer lowers the order of the last two.
FEW = 15


def ours(name: str, **options: Any) -> Callable[..., Sampler]:
    """Our sampler, but for its ``final``."""
    return partial(samplers.create, name, **options)


class WrongSign3mSde(Dpmpp3mSde):
    """The peer's third-order SDE steps have psi_3 - 1 in place of psi_3: a sign is wrong in its formula, which
    leaves an error of first order. With the sign set wrong here too its runs are ours.
    """

    def update(self, x: Form, answers: list[Evaluation], now: Point, then: Point, run: Run) -> Form:
        right = super().update(x, answers, now, then, run)
        terms = self.terms(answers, now, then)
        return right - then.alpha * terms[2][1] if len(terms) == 3 else right


class WrongSign3sSde(Dpmpp3s):
    """The same sign in the peer's single steps of three stages."""

    def update(self, x: Form, terms: list[tuple[int, Form]], start: Point, then: Point, run: Run) -> Form:
        right = super().update(x, terms, start, then, run)
        return right - then.alpha * terms[2][1] if len(terms) == 3 else right


def euler(golden: Golden) -> Plan:
    """EulerDiscreteScheduler. With churn it asks the network before it adds the noise, unlike EDM."""
    golden.option("final_sigmas_type", "zero", ("zero", "sigma_min"))
    churn = golden.argument("s_churn", 0.0, (int, float))
    low, high = (
        golden.argument("s_tmin", 0.0, (int, float)),
        golden.argument("s_tmax", math.inf, (int, float)),
    )
    scale = golden.argument("s_noise", 1.0, (int, float))
    if not churn:
        return Plan(ours("euler"), Network(golden))

    def added(call: int, level: float) -> Tensor | float:
        drawn = golden.noise_of_call(call)
        return drawn[0] * scale * (level**2 - golden.levels[call] ** 2) ** 0.5 if drawn else 0.0

    # The peer divides the churn by the length of its table, which may be longer than the run.
    churn *= golden.calls / (len(golden["sigmas"]) - 1)
    sampler = ours("edm", solver="euler", s_churn=churn, s_tmin=low, s_tmax=high, s_noise=scale)
    return Plan(sampler, Misasked(golden, added=added), noise_first=True)


def heun(golden: Golden) -> Plan:
    """HeunDiscreteScheduler: two calls a step, the second at the next step's sigma."""
    return Plan(ours("heun"), Network(golden, golden.limiter()))


def dpm2(golden: Golden) -> Plan:
    """KDPM2DiscreteScheduler: every other call is at a stage inside the step."""
    return Plan(ours("dpm2"), Network(golden), golden.points(stages=2))


def dpm2_ancestral(golden: Golden) -> Plan:
    """KDPM2AncestralDiscreteScheduler. In its recorded runs the network is told the level of the next step's stage."""
    return Plan(ours("dpm2_ancestral"), Misasked(golden), golden.points(stages=2))


def lms(golden: Golden) -> Plan:
    """LMSDiscreteScheduler."""
    return Plan(ours("lms", order=golden.argument("order", 4, (1, 2, 3, 4))), Network(golden))


def flow_euler(golden: Golden) -> Plan:
    """FlowMatchEulerDiscreteScheduler; it takes arguments of churn and ignores them."""
    golden.option("invert_sigmas", False, (False,))
    for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
        golden.argument(name, 0.0, (int, float))
    stochastic = golden.option("stochastic_sampling", False, FLAG)
    return Plan(ours("flow_euler", stochastic_sampling=stochastic), Network(golden))


def flow_heun(golden: Golden) -> Plan:
    """FlowMatchHeunDiscreteScheduler."""
    return Plan(ours("flow_heun"), Network(golden))


def ddim(golden: Golden) -> Plan:
    """DDIMScheduler: it steps to t - T // steps, wherever its next time is, and may keep the unlimited noise."""
    eta = golden.argument("eta", 0.0, (int, float))
    limited = golden.limiter(clips_by_default=True)
    # Limiting x0 moves the noise too, unless the peer is left to read it from the unlimited x0.
    source = "guided" if golden.argument("use_clipped_model_output", False, FLAG) else "uncond"
    plan = Plan(ours("ddim", eta=eta, renoise=source), Network(golden, limited))
    times, ends = golden["timesteps"].tolist(), golden["prev_timesteps"].tolist()
    last = golden.point(golden.levels[-1])
    if times[1:] == ends[:-1]:
        return plan
    lands = [golden.at(t) if t >= 0 else last for t in ends]
    return Plan(
        plan.sampler,
        plan.network,
        departs="steps to times that are not the next of its grid",
        apart=[(golden.at(t), then) for t, then in zip(times, lands, strict=True)],
    )


def plms(golden: Golden) -> Plan:
    """PNDMScheduler: one call more than steps, or nine with the Runge-Kutta start."""
    skip = golden.option("skip_prk_steps", False, FLAG)
    times = golden["timesteps"].tolist()
    # Of the calls before the linear steps only the first of each step is on the grid.
    grid = [times[0], *times[2:]] if skip else [*times[:12:4], *times[12:]]
    last = golden.point(golden.levels[-1])
    stride = golden.option("num_train_timesteps", 1000, (int,)) // golden.meta["steps"]
    departs = ""
    if golden.meta["prediction_type"] == "v_prediction" and golden.calls > 1:
        departs = "extrapolates v, and turns it into noise with the newest state alone"
    elif not skip and golden.meta["steps"] < 4:
        departs = "ends before its grid does"
    elif any(before - after != stride for before, after in pairwise(grid)):
        departs = "steps to times that are not the next of its grid"
    elif not skip and stride % 2:
        departs = "its half steps end half a time away from where the network is asked"
    points = [*(golden.at(t) for t in grid), last]
    return Plan(ours("plms", skip_prk_steps=skip), Network(golden), points, departs)


def lowered(golden: Golden, order: int, euler_at_final: bool, to_zero: bool) -> dict[str, Any]:
    """Options of a multistep sampler that lower the order at the end as the DPM-Solver and DEIS schedulers do."""
    lower = golden.option("lower_order_final", True, FLAG)
    if not golden.stalls and not euler_at_final:
        return {"lower_order_final": lower}
    count = golden.calls
    orders = [min(order, i + 1) for i in range(count)]
    if lower and count < FEW:
        orders[-2:-1] = [min(2, n) for n in orders[-2:-1]]
    if euler_at_final or to_zero or golden.stalls or (lower and count < FEW):
        orders[-1] = 1  # a step of no length does nothing, whatever its order
    return {"orders": orders}


def final_type(golden: Golden) -> bool:
    """Whether the table says that it ends at 0."""
    return bool(golden.option("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero")


def dpm_multistep(golden: Golden) -> Plan:
    """DPMSolverMultistepScheduler and EDMDPMSolverMultistepScheduler."""
    algorithms = ("dpmsolver++", "sde-dpmsolver++", "deis", "dpmsolver", "sde-dpmsolver")
    algorithm = golden.option("algorithm_type", "dpmsolver++", algorithms)
    order = golden.option("solver_order", 2, (1, 2, 3))
    kind = golden.option("solver_type", "midpoint", ("midpoint", "heun", *MIDPOINT_TOO))
    golden.option("variance_type", None, (None,))
    euler_at_final = golden.option("euler_at_final", False, FLAG)
    options = lowered(golden, order, euler_at_final, final_type(golden))
    network = Network(golden, golden.limiter())
    stem = "dpm_solver" if algorithm.endswith("dpmsolver") else "dpmpp"
    sde = algorithm.startswith("sde")
    if order == 1:
        options = {"orders": [1] * golden.calls}
    options["kind"] = "heun" if kind == "heun" else "midpoint"
    if order < 3 or not sde:
        return Plan(ours(f"{stem}_{max(order, 2)}m{'_sde' if sde else ''}", **options), network)
    if stem == "dpm_solver":
        raise UnknownRunError(f"{golden}: the peer has no third order of {algorithm}")
    return Plan(partial(WrongSign3mSde, **options), network)


def dpm_singlestep(golden: Golden) -> Plan:
    """DPMSolverSinglestepScheduler."""
    algorithm = golden.option(
        "algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++", "deis", "dpmsolver")
    )
    order = golden.option("solver_order", 2, (1, 2, 3))
    kind = golden.option("solver_type", "midpoint", ("midpoint", "heun", *MIDPOINT_TOO))
    golden.option("variance_type", None, (None,))
    lower, to_zero = golden.option("lower_order_final", False, FLAG), final_type(golden)
    lower = lower or to_zero or golden.calls % order > 0  # the peer changes it to true where it must
    options: dict[str, Any] = {"kind": "heun" if kind == "heun" else "midpoint", "lower_order_final": lower}
    if algorithm != "dpmsolver":
        options["eta"] = float(algorithm.startswith("sde"))
    if order == 1:  # single steps of order 1 are those of DDIM, and of its SDE
        options |= {"groups": [1] * golden.calls, "lower_order_final": False}
    network = Network(golden, golden.limiter())
    if order == 3 and algorithm.startswith("sde") and kind == "heun":
        return Plan(partial(WrongSign3sSde, **options), network)
    stem = "dpm_solver" if algorithm == "dpmsolver" else "dpmpp"
    return Plan(ours(f"{stem}_{max(order, 2)}s", **options), network)


def deis(golden: Golden) -> Plan:
    """DEISMultistepScheduler: the polynomial is in log rho."""
    golden.option("algorithm_type", "deis", ("deis", "dpmsolver", "dpmsolver++"))
    golden.option("solver_type", "logrho", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    order = golden.option("solver_order", 2, (1, 2, 3))
    options = lowered(golden, order, euler_at_final=False, to_zero=False)
    sampler = ours("deis", variable="log_rho", order=order, **options)
    return Plan(sampler, Network(golden, golden.limiter()))


def unipc(golden: Golden) -> Plan:
    """UniPCMultistepScheduler."""
    order = golden.option("solver_order", 2, (1, 2, 3, 4))
    variant = golden.option("solver_type", "bh2", ("bh1", "bh2", *BH2_TOO))
    data = golden.option("predict_x0", True, FLAG)
    skipped = golden.option("disable_corrector", [])
    golden.option("solver_p", None, (None,))
    final_type(golden)
    lower, count = golden.option("lower_order_final", True, FLAG), golden.calls
    options: dict[str, Any] = {"lower_order_final": lower}
    if golden.stalls and not lower:
        options = {"orders": [*(min(order, i + 1) for i in range(count - 1)), 1]}
    sampler = ours(
        "unipc",
        order=order,
        variant="bh1" if variant == "bh1" else "bh2",
        predict="x0" if data else "noise",
        disable_corrector=skipped,
        **options,
    )
    limit: Callable[[Tensor], Tensor] = golden.limiter()
    # The peer thresholds x0 only where it predicts x0.
    return Plan(sampler, Network(golden, limit) if data else Network(golden))


TRANSLATE: dict[str, Translator] = {
    "DDIMScheduler": ddim,
    "DEISMultistepScheduler": deis,
    "DPMSolverMultistepScheduler": dpm_multistep,
    "DPMSolverSinglestepScheduler": dpm_singlestep,
    "EulerDiscreteScheduler": euler,
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "FlowMatchHeunDiscreteScheduler": flow_heun,
    "HeunDiscreteScheduler": heun,
    "KDPM2AncestralDiscreteScheduler": dpm2_ancestral,
    "KDPM2DiscreteScheduler": dpm2,
    "LMSDiscreteScheduler": lms,
    "PNDMScheduler": plms,
    "UniPCMultistepScheduler": unipc,
}

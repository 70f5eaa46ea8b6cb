"""Every recorded run of a peer's schedulers, state by state, on the recorded grid and noise.

``IMAGEN_KIT_GOLDENS`` names another folder of recorded runs to play instead. Runs that the peer computes
otherwise than its method says are told by their options (a plan's ``departs`` has the reason), and judged
against the exact solution, where ours must be nearer than the peer's.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any

import golden_deterministic
import golden_stochastic
import pytest
import torch
from golden_data import FOLDER, Golden, UnknownRunError, load
from golden_runs import Plan, error_of_our_own, replay, replay_apart, worst

pytestmark = pytest.mark.parity

TRANSLATE = golden_deterministic.TRANSLATE | golden_stochastic.TRANSLATE

#: float64 on both sides; rounding alone separates them (about 1e-12 at the largest states).
TOLERANCE = 1e-8
#: A start without signal: the peer puts 2^-12 in place of alpha = 0, and divides by it.
NO_SIGNAL_TOLERANCE = 1e-6

RUNS = load()

#: Why runs of the copy in this repository are not replayed as a whole, and how many.
DEPARTURES = {
    "steps to times that are not the next of its grid": 15,
}


def plan_of(golden: Golden) -> Plan:
    """How a run is replayed; UnknownRunError where anything about it is unknown."""
    if golden.scheduler not in TRANSLATE:
        raise UnknownRunError(f"{golden}: scheduler {golden.scheduler} is not known")
    plan = TRANSLATE[golden.scheduler](golden)
    _ = golden.schedule  # reads the betas
    golden.check_read()
    return plan


def test_there_are_runs() -> None:
    assert RUNS, f"{FOLDER} holds no recorded runs"


@pytest.mark.parametrize("golden", RUNS, ids=str)
def test_recorded_run(golden: Golden) -> None:
    plan = plan_of(golden)
    no_signal = golden.meta["config"].get("rescale_betas_zero_snr", False)
    tolerance = NO_SIGNAL_TOLERANCE if no_signal else TOLERANCE
    theirs = list(golden["x"])
    if not plan.departs:
        ours = replay(golden, plan)
        assert len(ours) == len(theirs)
        assert worst(ours, theirs) < tolerance
        return
    if plan.apart is not None:
        assert worst(replay_apart(golden, plan), theirs[1:]) < tolerance
    if "ode_final" in golden.tensors:
        assert error_of_our_own(golden, plan) < golden.meta["error_to_ode"], plan.departs


@pytest.mark.skipif("IMAGEN_KIT_GOLDENS" in os.environ, reason="counts the runs of the repository's copy")
def test_nothing_is_left_out() -> None:
    """All 559 runs are there; those set aside are the ones with the reasons above."""
    assert len(RUNS) == 559
    departs = [(golden, plan_of(golden)) for golden in RUNS]
    assert Counter(plan.departs for _, plan in departs if plan.departs) == DEPARTURES
    flagged = {str(golden) for golden in RUNS if golden.meta.get("grid_consistent") is False}
    assert flagged == {str(golden) for golden, plan in departs if plan.departs}
    # What neither the exact solution nor single steps can judge is not judged at all.
    assert all(plan.apart or "ode_final" in golden.tensors for golden, plan in departs if plan.departs)


def changed(golden: Golden, **meta: Any) -> Golden:
    """The run with other metadata; nested dicts are updated."""
    merged = {
        key: {**golden.meta[key], **value} if isinstance(value, dict) else value
        for key, value in meta.items()
    }
    return dataclasses.replace(golden, meta={**golden.meta, **merged}, read=set())


FIRST = {golden.scheduler: golden for golden in reversed(RUNS)}


@pytest.mark.parametrize("scheduler", sorted(FIRST))
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"scheduler": "HeunScheduler"}, "scheduler HeunScheduler is not known"),
        ({"config": {"solver_ordr": 2}}, "argument solver_ordr=2 is not known"),
        ({"config": {"timestep_spacing": "logspace"}}, "timestep_spacing='logspace' is not known"),
        ({"step_kwargs": {"etaa": 0.0}}, r"arguments \['etaa'\] are not known"),
        ({"set_timesteps_kwargs": {"guidance": 0.5}}, r"arguments \['guidance'\] are not known"),
    ],
    ids=["scheduler", "option", "value", "argument", "grid"],
)
def test_what_is_unknown_fails(scheduler: str, change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UnknownRunError, match=rule):
        plan_of(changed(FIRST[scheduler], **change))


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver+++"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}),
        ("DPMSolverSinglestepScheduler", {"solver_type": "ralston"}),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}),
        ("DEISMultistepScheduler", {"variance_type": "learned"}),
        ("DDIMScheduler", {"clip_sample": "yes"}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("EulerDiscreteScheduler", {"beta_schedule": "quadratic"}),
    ],
)
def test_unknown_values_fail(scheduler: str, config: dict[str, Any]) -> None:
    if scheduler in FIRST:  # another folder may lack it
        with pytest.raises(UnknownRunError, match="is not known"):
            plan_of(changed(FIRST[scheduler], config=config))


@pytest.mark.parametrize("scheduler", sorted(FIRST))
def test_a_changed_state_is_seen(scheduler: str) -> None:
    """One number of one state, off by 1e-6 or nan, is a failure: the comparison sees all of them."""
    mine = (golden for golden in RUNS if golden.scheduler == scheduler)
    golden = next((golden for golden in mine if not plan_of(golden).departs), None)
    if golden is None:
        pytest.skip("all its runs depart from its method")
    for change in (1e-6, torch.nan):
        x = golden["x"].clone()
        x[len(x) // 2, 3, 1] += change
        with pytest.raises(AssertionError):
            test_recorded_run(dataclasses.replace(golden, tensors={**golden.tensors, "x": x}, read=set()))

"""Running plans: weighted sums, the buffer of small runs, further slots, and what a run may not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_oracles import gaussian_denoiser
from torch.utils._python_dispatch import TorchDispatchMode

from imagen_kit import samplers, schedules
from imagen_kit.errors import KitError
from imagen_kit.samplers import arena
from imagen_kit.samplers.execution import weighted_sum
from imagen_kit.samplers.noise import gaussian
from imagen_kit.samplers.tableau import Row, Tableau

LINEAR = [name for name in samplers.names() if samplers.describe(name)["linear"]]
SCHEDULE = schedules.create("scaled_linear")


def tableau(rows: list[Row]) -> Tableau:
    return Tableau(tuple(rows), 1, (1.0, 0.0), (0.0, 1.0), (1.0, 0.0), 1.0)


class Calls(TorchDispatchMode):
    """Every kernel called, and those that make the host wait for a device."""

    #: What reads a tensor's content back, or makes a shape depend on it.
    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        self.names.append(name)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        moved = (kwargs or {}).get("device")
        copies = name == "copy_" and len({a.device.type for a in tensors}) > 1
        copies |= name == "_to_copy" and moved is not None and torch.device(moved) != tensors[0].device
        if name in self.WAITING or copies:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_counter_of_syncs_counts() -> None:
    """What the next test counts is seen at all: reading a number, and copies between devices."""
    with Calls() as calls:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
        torch.ones(2).to("meta")
    assert calls.waits == ["_local_scalar_dense", "nonzero", "_to_copy"]


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 3, 64, 64)], ids=["small", "large"])
@pytest.mark.parametrize("name", LINEAR)
def test_no_linear_sampler_waits_for_the_device(name: str, shape: tuple[int, ...]) -> None:
    """Not in the loop, and with a remembered tableau nowhere in the run."""
    sampler = samplers.create(name)
    sampler.tableau(SCHEDULE, 6)
    x, generator = torch.ones(shape), torch.Generator().manual_seed(0)
    with torch.no_grad(), Calls() as calls:
        sampler.sample(lambda x, t: x * 0.5, x, SCHEDULE, 6, generator=generator)
    assert calls.waits == []


def test_times_of_every_sample_are_moved_before_the_loop() -> None:
    grids = torch.tensor([[0.9, 0.5, 0.2], [0.8, 0.6, 0.1]], dtype=torch.float64)
    sampler, flow = samplers.create("dpmpp_2m"), schedules.create("flow")
    seen: list[int] = []
    with torch.no_grad(), Calls() as calls:

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(len(calls.waits))
            return x * 0.5

        sampler.sample(denoise, torch.ones(2, 3, 4, 4), flow, timesteps=grids)
        assert seen == [seen[0]] * 3
        assert len(calls.waits) == seen[0]


@pytest.mark.parametrize("name", LINEAR)
def test_small_runs_equal_large_ones(name: str) -> None:
    """The buffer of small runs and the general loop are the same sums: with gradients on it is the latter."""
    sampler = samplers.create(name)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = sampler.tableau(SCHEDULE, 12).plan

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        states: list[torch.Tensor] = []
        noise = gaussian(x, torch.Generator().manual_seed(1))
        keep = lambda step, state, x0: states.append(state)  # noqa: E731
        return plan.run(gaussian_denoiser(SCHEDULE, 0.2, 0.5), x, noise, keep), states

    with torch.enable_grad():
        assert not arena.fits(plan, x)
        expected, expected_states = run()
    with torch.no_grad():
        assert arena.fits(plan, x)  # a window that no longer fits means a formula without ``run.keep``
        got, states = run()
    assert len(states) == 12
    # Sums of a dozen float64 terms in another order, with weights up to 1e3 near sigma/alpha = 15.
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.stack(states), torch.stack(expected_states), rtol=1e-11, atol=1e-11)


def test_only_small_plain_runs_use_the_buffer() -> None:
    plan = samplers.create("dpmpp_2m").tableau(SCHEDULE, 5).plan
    with torch.no_grad():
        assert arena.fits(plan, torch.zeros(1, 4, 8, 8))
        assert arena.fits(plan, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
        assert not arena.fits(plan, torch.zeros(1, 3, 256, 256))
        assert not arena.fits(plan, torch.zeros(0, 4))
        assert not arena.fits(plan, torch.zeros(1, 4, device="meta"))


def test_states_of_a_small_run_stay_what_they_were() -> None:
    """They are rows of the run's buffer, and no later row may be written over them."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((x, x.clone()))
        return x * 0.9

    with torch.no_grad():
        sampler = samplers.create("unipc", order=3)
        first = sampler.sample(denoise, torch.ones(1, 2), SCHEDULE, 8)
        second = sampler.sample(denoise, torch.ones(1, 2), SCHEDULE, 8)
    assert all(torch.equal(now, then) for now, then in seen)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_dead_slot_is_dropped() -> None:
    """A long run keeps no more answers than its formula reads."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        nonlocal most
        answer = x * 0.5
        alive.append(weakref.ref(answer))
        most = max(most, sum(ref() is not None for ref in alive))
        return answer

    samplers.create("dpmpp_3m").sample(denoise, torch.ones(1, 3, 64, 64), SCHEDULE, 20)
    assert len(alive) == 20
    assert most <= 4  # three of history, and the last one handed to a callback


@pytest.mark.parametrize("terms", [1, 2, 3, 6])
def test_weighted_sums(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    tensors = [torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(terms)]
    weights = [0.3 * i - 0.7 for i in range(terms)]
    expected = torch.einsum("k...,k->...", torch.stack(tensors), torch.tensor(weights, dtype=torch.float64))
    kept = [tensor.clone() for tensor in tensors]
    layouts = {"contiguous": tensors, "transposed": [t.mT.contiguous().mT for t in tensors]}
    for layout, given in layouts.items():
        torch.testing.assert_close(weighted_sum(given, weights), expected, rtol=1e-14, atol=1e-14, msg=layout)
    batched = [torch.full((3, 1, 1), weight, dtype=torch.float64) for weight in weights]
    torch.testing.assert_close(weighted_sum(tensors, batched), expected, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_a_sum_has_no_temporaries() -> None:
    """One kernel for the first two terms, one in place for every further one, and nothing else of that size."""
    tensors = [torch.ones(64, 64) for _ in range(4)]
    with Calls() as calls:
        weighted_sum(tensors, [1.0, 2.0, 3.0, 4.0])
    heavy = [name for name in calls.names if name not in ("view", "ones")]
    assert heavy == ["addr", "add_", "add_"]


def test_gradients_pass_through_a_run() -> None:
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    out = samplers.create("dpmpp_2m").sample(lambda x, t: gain * x, x, SCHEDULE, 4)
    (by_x, by_gain) = torch.autograd.grad(out.sum(), (x, gain))
    # The run is linear in x; the derivative by the gain is compared with a difference quotient.
    torch.testing.assert_close(by_x, (out / x).detach(), rtol=1e-12, atol=1e-12)
    step = 1e-6
    shifted = samplers.create("dpmpp_2m").sample(lambda x, t: (gain + step) * x, x, SCHEDULE, 4)
    assert by_gain.item() == pytest.approx(((shifted - out).sum() / step).item(), rel=1e-5)


class Guided:
    """A denoiser that also tells the unconditional prediction."""

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return x + 1

    def parts(self, x: torch.Tensor, t: float, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        assert names == ("uncond",)
        return x + 1, x + 10


@pytest.mark.parametrize("grad", [False, True], ids=["small", "general"])
def test_a_row_can_fill_several_slots(grad: bool) -> None:
    rows = [
        Row("x", (("x", 1.0),), 0.9, ("d0", "d0:uncond"), ("uncond",)),
        Row("s1", (("d0", 2.0), ("d0:uncond", -1.0)), 0.5, ("d1",), step=0),
        Row("s2", (("s1", 1.0), ("d1", 1.0)), step=1),
    ]
    made = tableau(rows)
    with torch.set_grad_enabled(grad):
        steps = [
            (state.item(), x0.item()) for _, state, x0 in made.iterate(Guided(), torch.ones(1), torch.rand)
        ]
        # s1 = 2·2 - 11, then d1 = s1 + 1
        assert steps == [(-7.0, 2.0), (-13.0, -6.0)]
        assert str(rows[0]) == "d0, d0:uncond = x0, x0 uncond(x, t=0.9)"
        with pytest.raises(KitError, match="with renoise='uncond' needs a guided denoiser"):
            made.run(lambda x, t: x, torch.ones(1), torch.rand)


def test_a_traced_row_can_fill_several_slots() -> None:
    made = samplers.create("ddim", renoise="uncond").tableau(SCHEDULE, 3)
    assert made.plan.parts == ("uncond",)
    assert made.nfe == 3
    plain = samplers.create("ddim").tableau(SCHEDULE, 3)
    assert plain.plan.parts == ()


def test_guidance_begins_anew_with_every_run() -> None:
    begun: list[tuple[Any, ...]] = []

    class Remembering:
        def begin(self, times: Any, generator: Any, parts: Any) -> Any:
            begun.append((tuple(times), generator, parts))
            return lambda x, t: x * 0.5

    sampler, generator = samplers.create("ddim", eta=1.0), torch.Generator()
    sampler.sample(Remembering(), torch.ones(1, 2), SCHEDULE, 3, generator=generator)  # type: ignore[arg-type]
    assert begun == [(sampler.tableau(SCHEDULE, 3).times, generator, ())]

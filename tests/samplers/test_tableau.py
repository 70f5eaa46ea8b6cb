"""Linear forms and running rows on tensors."""

from __future__ import annotations

import math

import pytest
import torch

from imagen_kit.samplers.base import Run
from imagen_kit.samplers.grid import Point, clean
from imagen_kit.samplers.tableau import Form, Row, Tableau
from imagen_kit.schedules.flow import Flow

X, D = Form({"x": 1.0}), Form({"d0": 1.0})
POINT = Point(0.5, 0.5, 0.5)


def tableau(rows: list[Row]) -> Tableau:
    return Tableau(tuple(rows), 1, (1.0, 0.0), (0.0, 1.0), (1.0, 0.0), 1.0)


def test_forms_are_linear() -> None:
    form = 2 * X - (D + X) / 4 + (-D)
    assert form.terms == {"x": 1.75, "d0": -1.25}
    assert repr(form) == "1.75 x + -1.25 d0"
    assert (X * 1.0).slot == "x"
    assert (X * 2.0).slot is None
    assert (X + D).slot is None
    assert not (X * math.inf).finite


def test_forms_leave_their_operands_alone() -> None:
    a, b = Form({"x": 1.0}), Form({"x": 2.0})
    _ = a + b
    assert a.terms == {"x": 1.0}
    assert b.terms == {"x": 2.0}


def test_a_step_and_the_next_evaluation_share_a_row() -> None:
    run = Run(Flow(), [POINT, clean(Flow())])
    answer = run.denoise(X, POINT)
    state = run.step(X + answer)
    run.denoise(state, POINT)
    assert run.rows == [
        Row("x", (("x", 1.0),), 0.5, ("d0",)),
        Row("s1", (("x", 1.0), ("d0", 1.0)), 0.5, ("d1",), step=0),
    ]
    assert str(run.rows[1]) == "s1 = 1 x + 1 d0; d1 = x0(s1, t=0.5)"


def test_slots_of_weight_zero_are_never_filled() -> None:
    """A noise of weight zero is not drawn, so the next one takes its place in the sequence."""
    run = Run(Flow(), [POINT, clean(Flow())])
    state = run.step(X + 0.0 * run.noise())
    run.step(state + 2.0 * run.noise())
    drawn = []

    def noise() -> torch.Tensor:
        drawn.append(1)
        return torch.ones(2)

    assert tableau(run.rows).noises == 1
    assert tableau(run.rows).run(lambda x, t: x, torch.zeros(2), noise).tolist() == [2.0, 2.0]
    assert len(drawn) == 1


def test_infinite_coefficients_are_refused() -> None:
    run = Run(Flow(), [POINT, clean(Flow())])
    with pytest.raises(OverflowError):
        run.step(X * math.inf)


def test_rows_run_as_written() -> None:
    rows = [
        Row("x", (("x", 1.0),), 0.9, ("d0",)),
        Row("s1", (("x", 0.5), ("d0", 2.0)), 0.4, ("d1",), step=0),
        Row("s2", (("s1", 1.0), ("d0", -1.0), ("n0", 3.0)), step=1),
    ]
    seen: list[tuple[float, list[float]]] = []

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((t, x.tolist()))
        return x + t

    steps: list[tuple[int, list[float], list[float]]] = []
    out = tableau(rows).run(
        denoise,
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        lambda: torch.tensor([10.0, 20.0]),
        lambda step, x, x0: steps.append((step, x.tolist(), x0.tolist())),
    )
    d0 = [1.9, 2.9]
    s1 = [0.5 + 3.8, 1.0 + 5.8]
    assert seen == [(0.9, [1.0, 2.0]), (0.4, pytest.approx(s1))]
    assert out.tolist() == pytest.approx([s1[0] - d0[0] + 30, s1[1] - d0[1] + 60])
    assert [(step, x0) for step, _, x0 in steps] == [
        (0, pytest.approx(d0)),
        (1, pytest.approx([s1[0] + 0.4, s1[1] + 0.4])),
    ]
    assert tableau(rows).nfe == 2


def test_steps_can_be_taken_by_hand() -> None:
    rows = [Row("x", (("x", 1.0),), 0.9, ("d0",)), Row("s1", (("d0", 0.5),), step=0)]
    by_hand = tableau(rows).iterate(lambda x, t: 4 * x, torch.ones(1), lambda: torch.zeros(1))
    step, x, x0 = next(by_hand)
    assert (step, x.item(), x0.item()) == (0, 2.0, 4.0)
    assert next(by_hand, None) is None


def test_half_precision_is_summed_in_float32() -> None:
    """1 + 256 · 2^-8 loses every term in bfloat16 sums, and none here."""
    rows = [Row("s1", (("x", 1.0), *((f"n{i}", 1.0) for i in range(256))), step=0)]
    small = torch.full((1,), 2.0**-8, dtype=torch.bfloat16)
    out = tableau(rows).run(lambda x, t: x, torch.ones(1, dtype=torch.bfloat16), lambda: small)
    assert out.dtype == torch.bfloat16
    assert out.item() == 2.0


def test_the_start_is_not_written_to() -> None:
    x = torch.ones(3)
    tableau([Row("s1", (("x", 2.0), ("n0", 1.0)), step=0)]).run(lambda x, t: x, x, lambda: torch.ones(3))
    assert x.tolist() == [1.0, 1.0, 1.0]

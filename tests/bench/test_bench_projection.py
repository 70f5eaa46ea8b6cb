"""What is told on paper: the sums behind it."""

from __future__ import annotations

import pytest

from imagen_kit.bench import projection
from imagen_kit.bench.projection import (
    BATCH,
    Network,
    evaluation_seconds,
    picture_seconds,
    training_step_seconds,
)

SIMPLE = Network(10**12, 10**11, 10**9, 10, messages=100, halo=4_500_000, gathered=45_000_000)


def test_the_base_has_the_arithmetic_known_of_it():
    """The published architecture comes to 2.305 B parameters and 1.56 TFLOP a forward pass."""
    base = projection.networks()["imagen_64"]
    assert base.parameters == pytest.approx(2.305e9, rel=1e-3)
    assert base.flops == pytest.approx(1.56e12, rel=5e-3)
    assert base.gathered > 0


def test_the_last_network_is_trained_on_crops_a_sixteenth_of_its_pictures():
    last = projection.networks()["imagen_256_to_1024"]
    assert last.training_flops == pytest.approx(
        last.flops / 16, rel=0.01
    )  # cross-attention's keys do not shrink


def test_an_evaluation_shared_by_gpus():
    assert evaluation_seconds(SIMPLE, 1, 1e14) == 0.01
    messages, halo, gathered = 100 * 10e-6, 2 * 4.5e6 / 450e9, 0.75 * 45e6 / 450e9
    assert evaluation_seconds(SIMPLE, 4, 1e14) == pytest.approx(0.0025 + messages + halo + gathered)


def test_a_picture_is_sooner_there_with_a_node_but_not_eight_times():
    one, node = picture_seconds(1, 4e14), picture_seconds(8, 4e14)
    assert one / 8 < node < one / 2
    assert picture_seconds(1000, 4e14) == node
    assert picture_seconds(1, 8e14) == pytest.approx(one / 2)


def test_training_steps_wait_for_the_larger_of_arithmetic_and_exchange():
    seconds, share = training_step_seconds(SIMPLE, 1, 1e14)
    assert (seconds, share) == (pytest.approx(3 * BATCH * 1e11 / 1e14), pytest.approx(1.0))
    seconds, share = training_step_seconds(SIMPLE, 1024, 1e14)
    forward, exchange = 2 * 1e11 / 1e14, 2 * 1023 / 1024 * 4e9 / 400e9
    assert seconds == pytest.approx(forward + exchange)
    assert share == pytest.approx(3 * forward / seconds)
    uneven, _ = training_step_seconds(SIMPLE, 1000, 1e14)
    assert uneven == pytest.approx(1.5 * forward + 2 * 999 / 1000 * 4e9 / 400e9)  # three pictures on some


def row(kind, name, tflops, status="ok"):
    return {
        "kind": kind,
        "id": f"{kind}/{name}/batch=1",
        "status": status,
        "entries": {"imagen_kit": {"tflops": tflops}},
    }


def test_rates_are_measured_where_a_gpu_was():
    rows = [
        row("denoiser", "dit_xl_2", 600.0),
        row("denoiser", "if_i_l", 300.0),
        row("denoiser", "if_i_l", 350.0),
    ]
    rows += [row("training", "dit_xl_2", 400.0)]
    gpu = {"environment": {"kind": "cuda", "device": "NVIDIA X"}, "rows": rows}
    found = projection.rates(gpu)
    assert (found.forward, found.training) == (
        350e12,
        400e12,
    )  # a U-Net like the cascade's, else the best there is
    assert "NVIDIA X" in found.source
    for other in (None, {**gpu, "environment": {"kind": "cpu"}}, {**gpu, "rows": rows[:3]}):
        assert projection.rates(other).forward == pytest.approx(0.5 * 989e12)
        assert "published" in projection.rates(other).source


def test_the_text_has_a_row_for_each_number_of_gpus():
    told = projection.text()
    assert "| 1 | " in told
    assert "| 1,000 | " in told
    assert "Assumed: " in told

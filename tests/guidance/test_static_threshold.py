from __future__ import annotations

import pytest
import torch

from imagen_kit import denoise_fn, guidance, schedules
from imagen_kit.errors import KitError


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_x0_is_clipped_whatever_the_network_predicts(prediction):
    flow, x = schedules.create("flow"), 3 * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    free = denoise_fn(lambda x, t: x, flow, prediction)(x, 0.4)
    held = denoise_fn(
        lambda x, t: x, flow, prediction, guidance=guidance.create("static_threshold", limit=0.8)
    )(x, 0.4)
    assert torch.allclose(held, free.clamp(-0.8, 0.8), atol=1e-14)  # float64 rounding
    assert free.abs().max() > 0.8


@pytest.mark.parametrize("limit", [0, -1.0, "1"])
def test_a_wrong_limit_is_refused(limit):
    with pytest.raises(KitError, match="static_threshold limit must be"):
        guidance.create("static_threshold", limit=limit)
